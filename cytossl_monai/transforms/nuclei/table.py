"""Instances of nuclei and what is measured on each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from skimage.measure import regionprops_table
from skimage.segmentation import expand_labels

from cytossl_monai.transforms.kernels.stains import rgb_to_od
from cytossl_monai.transforms.nuclei.mask import nuclear_density

__all__ = ["TABLE_COLUMNS", "NucleiInstances", "describe_nuclei", "foreground"]

TABLE_COLUMNS = (
    "label",
    "x",
    "y",
    "area_um2",
    "diameter_um",
    "eccentricity",
    "solidity",
    "mean_od",
    "nucleus_to_foreground",
)
"""Columns of the table of nuclei: its label; centroid in pixels of the tile (x column, y row, centre of pixel 0 is 0);
area in square micrometres; diameter of the disc of that area; eccentricity in [0, 1); solidity in (0, 1] (area over
that of the convex hull); mean nuclear density (see ``nuclear_density``); share of the nucleus in the foreground that
lies nearer to it than to any other nucleus and within ``CELL_REACH`` micrometres, in (0, 1]."""

CELL_REACH = 15.0
FOREGROUND_DENSITY = 0.06


@dataclass(frozen=True)
class NucleiInstances:
    """Nuclei of one tile.

    Args:
        labels: int32 (H, W), 0 is background, 1..n the nuclei.
        table: one row a nucleus, ``TABLE_COLUMNS``.
        mpp: micrometres per pixel of ``labels``.
    """

    labels: NDArray[np.int32]
    table: pd.DataFrame
    mpp: float

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Bool (H, W), True inside nuclei."""
        return self.labels > 0

    def __len__(self) -> int:
        return int(self.labels.max(initial=0))


def foreground(image: torch.Tensor) -> NDArray[np.bool_]:
    """Pixels that are not clear glass.

    Args:
        image: (3 or 1, H, W), uint8 or floating point in [0, 1].

    Returns:
        bool (H, W): the densest channel exceeds that of the tile's own brightest hundredth by 0.06. Glass darker than
        0.3 (half of white) is not believed: a tile full of cells has no glass to compare with.
    """
    density = rgb_to_od(image.nan_to_num(1.0) if image.is_floating_point() else image).numpy()
    glass = np.minimum(np.quantile(density.reshape(len(density), -1), 0.01, axis=1), 0.3)
    return np.asarray((density - glass[:, None, None]).max(axis=0) > FOREGROUND_DENSITY)


def describe_nuclei(labels: NDArray[np.int32], mpp: float, image: torch.Tensor | None = None) -> pd.DataFrame:
    """Table of what is measured on each nucleus.

    Args:
        labels: int32 (H, W), 0 is background.
        mpp: micrometres per pixel.
        image: (3 or 1, H, W); None leaves ``mean_od`` and ``nucleus_to_foreground`` NaN.

    Returns:
        a DataFrame with ``TABLE_COLUMNS``, one row for each label that occurs.
    """
    if labels.size == 0 or int(labels.max()) == 0:
        empty = {name: pd.Series(dtype=np.int32 if name == "label" else np.float64) for name in TABLE_COLUMNS}
        return pd.DataFrame(empty)
    density = None if image is None else nuclear_density(image)[0].numpy()
    wanted = ("label", "centroid", "area", "equivalent_diameter_area", "eccentricity", "solidity")
    found = regionprops_table(
        labels, intensity_image=density, properties=wanted if density is None else (*wanted, "mean_intensity")
    )
    count = len(found["label"])
    ratio = np.full(count, np.nan)
    if image is not None:
        zones = expand_labels(labels, CELL_REACH / mpp) * (foreground(image) | (labels > 0))
        ratio = found["area"] / np.bincount(zones.ravel(), minlength=int(labels.max()) + 1)[found["label"]]
    return pd.DataFrame(
        {
            "label": found["label"].astype(np.int32),
            "x": found["centroid-1"],
            "y": found["centroid-0"],
            "area_um2": found["area"] * mpp**2,
            "diameter_um": found["equivalent_diameter_area"] * mpp,
            "eccentricity": found["eccentricity"],
            "solidity": found["solidity"],
            "mean_od": found["mean_intensity"] if density is not None else np.full(count, np.nan),
            "nucleus_to_foreground": ratio,
        },
        columns=list(TABLE_COLUMNS),
    )
