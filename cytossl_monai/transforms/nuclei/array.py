"""Find nuclei in a tile without weights: ``segment_instances``, and the MONAI transforms over it and its fast twin."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import Transform
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from skimage.io import imread

from cytossl_monai.transforms.kernels.stains import stain_matrix
from cytossl_monai.transforms.nuclei.imported import labels_from_geojson, labels_from_map
from cytossl_monai.transforms.nuclei.instances import as_output, check_image, check_mpp, segment_instances
from cytossl_monai.transforms.nuclei.mask import nuclei_mask
from cytossl_monai.transforms.nuclei.regions import RegionRules
from cytossl_monai.transforms.nuclei.table import NucleiInstances, describe_nuclei
from cytossl_monai.utils.errors import InputError, reason

__all__ = ["LoadNuclei", "NucleiInstances", "RegionRules", "SegmentNuclei", "Source"]


class SegmentNuclei(Transform):
    """Nuclei of a tile: binary mask, and on request an instance map and a table.

    Args:
        mpp: micrometres per pixel; None reads ``mpp`` from a MetaTensor's ``meta``.
        method: ``"instances"`` picks each nucleus exactly (``segment_instances``), ``"mask"`` runs the fast batched
            kernel (``nuclei_mask``) and forms instances, where asked for, from its connected components.
        output: ``"mask"`` returns the mask; ``"labels"`` the instance map; ``"all"`` a ``NucleiInstances``.
        stains: named stain or matrix for colour deconvolution, for ``method="instances"``; None suits every stain.
        rules: what counts as a nucleus; None for the defaults.

    Raises:
        ValueError: unknown method or output, ``mpp`` not positive.
    """

    def __init__(
        self,
        mpp: float | None = None,
        method: Literal["instances", "mask"] = "instances",
        output: Literal["mask", "labels", "all"] = "mask",
        stains: str | NDArray[Any] | None = None,
        rules: RegionRules | None = None,
    ) -> None:
        if method not in ("instances", "mask"):
            raise ValueError(f"method is {method!r}; it must be 'instances' or 'mask'.")
        if output not in ("mask", "labels", "all"):
            raise ValueError(f"output is {output!r}; it must be 'mask', 'labels' or 'all'.")
        if stains is not None:
            stain_matrix(stains)
        self.mpp = None if mpp is None else check_mpp(mpp)
        self.method, self.output, self.stains, self.rules = method, output, stains, rules

    def find(self, image: NdarrayOrTensor, mpp: float | None = None, table: bool = True) -> NucleiInstances:
        """Nuclei of one image with all that is known about them.

        Args:
            image: (3, H, W), (1, H, W) or (H, W).
            mpp: overrides the transform's own.
            table: also describe each nucleus.
        """
        if mpp is None:
            mpp = self.mpp
        if mpp is None and isinstance(image, MetaTensor):
            mpp = image.meta.get("mpp")
        scale = check_mpp(mpp)
        if self.method == "instances":
            return segment_instances(image, scale, stains=self.stains, rules=self.rules, table=table)
        pixels = check_image(image)
        mask = nuclei_mask(pixels[None], scale, rules=self.rules)[0, 0].cpu().numpy()
        labels = np.asarray(ndimage.label(mask, ndimage.generate_binary_structure(2, 2))[0], dtype=np.int32)
        return NucleiInstances(labels, describe_nuclei(labels if table else labels[:0, :0], scale, pixels.cpu()), scale)

    def __call__(self, img: NdarrayOrTensor, mpp: float | None = None) -> NdarrayOrTensor | NucleiInstances:
        """Segment one image.

        Args:
            img: (3, H, W) or (1, H, W), uint8 in [0, 255] or floating point in [0, 1].
            mpp: micrometres per pixel of this image, in place of the transform's own.

        Returns:
            mask uint8 (1, H, W) of values 0 and 1, or labels int32 (1, H, W), of the kind of ``img`` (a MetaTensor
            keeps its affine); with ``output="all"`` a ``NucleiInstances``.
        """
        found = self.find(img, mpp, table=self.output == "all")
        if self.output == "all":
            return found
        return as_output(found.labels if self.output == "labels" else found.mask.astype(np.uint8), img)


Source = str | os.PathLike[str] | ArrayLike | torch.Tensor | Mapping[str, Any]


class LoadNuclei(Transform):
    """Nuclei from elsewhere, as ``SegmentNuclei`` would give them.

    Args:
        mpp: micrometres per pixel of the tiles; needed for ``output="all"`` alone.
        output: ``"mask"``, ``"labels"`` or ``"all"``, see ``SegmentNuclei``.

    Raises:
        ValueError: unknown output, ``mpp`` not positive.
    """

    def __init__(self, mpp: float | None = None, output: Literal["mask", "labels", "all"] = "mask") -> None:
        if output not in ("mask", "labels", "all"):
            raise ValueError(f"output is {output!r}; it must be 'mask', 'labels' or 'all'.")
        self.mpp = None if mpp is None else check_mpp(mpp)
        self.output = output

    def __call__(
        self,
        source: Source,
        img: NdarrayOrTensor,
        mpp: float | None = None,
        origin: tuple[float, float] = (0.0, 0.0),
        downsample: float = 1.0,
        bounds_offset: tuple[float, float] = (0.0, 0.0),
    ) -> NdarrayOrTensor | NucleiInstances:
        """Bring the nuclei of one tile.

        Args:
            source: an instance map or mask, (H, W) or (1, H, W); a file of one (``.npy``, or an image); or GeoJSON, as
                a file (``.geojson`` or ``.json``) or as what it holds.
            img: the tile that they belong to, (C, H, W): gives the size, and the kind of what comes out.
            mpp: micrometres per pixel, in place of the transform's own.
            origin: of a GeoJSON, see ``labels_from_geojson``.
            downsample: of a GeoJSON, see ``labels_from_geojson``.
            bounds_offset: of a GeoJSON, see ``labels_from_geojson``.

        Returns:
            as ``SegmentNuclei``.

        Raises:
            ValueError: the map has another size than the tile, or cannot be read.
        """
        return self._give(self.labels(source, img, origin, downsample, bounds_offset), img, mpp)

    def labels(
        self,
        source: Source,
        img: NdarrayOrTensor,
        origin: tuple[float, float] = (0.0, 0.0),
        downsample: float = 1.0,
        bounds_offset: tuple[float, float] = (0.0, 0.0),
        name: str = "mask",
    ) -> NDArray[np.int32]:
        """Instance labels, int32 (H, W); arguments as of a call, ``name`` is what messages call the source."""
        shape = (int(img.shape[-2]), int(img.shape[-1]))
        if isinstance(source, Mapping):
            return labels_from_geojson(source, shape, origin, downsample, bounds_offset)
        if isinstance(source, (str, os.PathLike)):
            path = Path(source)
            if path.suffix.lower() in (".geojson", ".json"):
                return labels_from_geojson(path, shape, origin, downsample, bounds_offset)
            try:
                source = np.load(path) if path.suffix.lower() == ".npy" else imread(path)
            except (OSError, ValueError, EOFError, SyntaxError, MemoryError) as error:  # numpy's and Pillow's own
                raise InputError(
                    f"{path} cannot be read as an instance map ({reason(error)}); give .npy or an image."
                ) from error
            name = str(path)
        found = labels_from_map(cast(Any, source), name)
        if found.shape != shape:
            raise ValueError(f"{name} has the size {found.shape}; the tile has {shape}.")
        return found

    def _give(self, labels: NDArray[np.int32], img: NdarrayOrTensor, mpp: Any) -> NdarrayOrTensor | NucleiInstances:
        if self.output == "all":
            scale = check_mpp(self.mpp if mpp is None else mpp)
            return NucleiInstances(labels, describe_nuclei(labels, scale, check_image(img)), scale)
        return as_output(labels if self.output == "labels" else (labels > 0).astype(np.uint8), img)
