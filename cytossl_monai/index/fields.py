"""Cells as instances: fields centred on nuclei in place of the tiles of a grid, as a tile index of their own."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.data.tiles.nuclei_file import NucleusTable, nuclei_path
from cytossl_monai.utils.errors import TableError

__all__ = ["NucleusFields", "instance_fields", "nucleus_fields", "oddness"]


def oddness(table: pd.DataFrame) -> np.ndarray:
    """How much a nucleus stands out among those of its slide, float64 (N,): large, dark, or far from the usual shape.

    Robust deviations (from the median, in units of 1.4826 median absolute deviations) of the logarithm of the area and
    of the density, and half of that of the elongation; the largest of them counts. Small and pale do not stand out.
    """

    def deviation(values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float64)
        middle = np.median(values)
        spread = 1.4826 * np.median(np.abs(values - middle))
        return np.asarray((values - middle) / max(spread, 1e-3))

    if not len(table):
        return np.zeros(0)
    area = deviation(np.log(table["area_um2"].to_numpy(np.float64).clip(1e-3)))
    density, elongation = deviation(table["density"].to_numpy()), deviation(table["elongation"].to_numpy())
    return np.maximum.reduce([area, density, 0.5 * np.abs(elongation)])


@dataclass(frozen=True)
class NucleusFields:
    """Which fields stand for a slide's cells.

    At most ``max_fields`` nuclei of a slide are taken: ``odd_share`` of them are those that stand out most (see
    ``oddness``), the rest is drawn at random from the others, by ``seed`` and the slide's name.

    Args:
        size: side of a field in pixels at ``mpp``.
        mpp: micrometres per pixel of a field. A field of 32 to 64 um holds a cell and its neighbours.
        max_fields: the most fields of a slide; None takes every nucleus.
        odd_share: share of the cap, 0 to 1, kept for nuclei that stand out.
        seed: of the draw.

    Raises:
        ValueError: a side below 16 pixels, a resolution, cap or share out of range.
    """

    size: int = 96
    mpp: float = 0.5
    max_fields: int | None = 2000
    odd_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"field_size is {self.size}; a field must have 16 pixels or more")
        if not 0.05 <= self.mpp <= 20:
            raise ValueError(f"field_mpp is {self.mpp}; it must be 0.05 to 20 micrometres per pixel")
        if self.max_fields is not None and self.max_fields < 1:
            raise ValueError(f"max_fields is {self.max_fields}; it must be 1 or more, or null for every nucleus")
        if not 0 <= self.odd_share <= 1:
            raise ValueError(f"odd_share is {self.odd_share}; it must lie in [0, 1]")

    def choose(self, table: pd.DataFrame, slide_id: str) -> np.ndarray:
        """Row numbers of the nuclei taken, rising."""
        count = len(table)
        if self.max_fields is None or count <= self.max_fields:
            return np.arange(count)
        odd = round(self.odd_share * self.max_fields)
        order = np.argsort(-oddness(table), kind="stable")
        rng = np.random.default_rng([self.seed, zlib.crc32(slide_id.encode())])
        rest = rng.choice(order[odd:], self.max_fields - odd, replace=False)
        return np.sort(np.concatenate([order[:odd], rest]))

    def of(self, index: TileIndex, nuclei: NucleusTable) -> TileIndex:
        """The fields of a slide, ordered by rows of fields and columns, so that neighbours are read together.

        Raises:
            TableError: where the nuclei are of another slide, or there is none.
        """
        if nuclei.meta.get("fingerprint") != index.meta.get("fingerprint"):
            raise TableError(f"the nuclei of {index.slide_id} are of another slide file than its tiles; index it again")
        if not len(nuclei):
            raise TableError(
                f"slide {index.slide_id} holds no nucleus to centre a field on; index it with other rules, or, for a "
                "bag, take instances: tiles"
            )
        chosen = nuclei.table.iloc[self.choose(nuclei.table, index.slide_id)]
        centres = chosen[["x", "y"]].to_numpy(np.float64)
        side = self.size * self.mpp / index.level0_mpp
        order = np.lexsort((centres[:, 0], np.floor(centres[:, 1] / side)))
        chosen, corners = chosen.iloc[order], np.round(centres[order] - side / 2).astype(np.int64)
        fields = pd.DataFrame({"slide_id": index.slide_id, "x": corners[:, 0], "y": corners[:, 1]})
        fields["size"], fields["level"], fields["mpp"] = max(1, round(side)), 0, self.mpp
        fields["n_nuclei"] = 1
        area = chosen["area_um2"].to_numpy(np.float32)
        fields["nuclei_fraction"] = np.minimum(area / np.float32((self.size * self.mpp) ** 2), 1)
        fields["foreground_fraction"] = fields["sharpness"] = np.float32(1)
        fields["area_um2"], fields["density"] = area, chosen["density"].to_numpy(np.float32)
        settings = {**index.meta["settings"], "tile_size": self.size, "mpp": self.mpp}
        return TileIndex(fields, {**index.meta, "settings": settings, "instances": "nuclei", "fields": asdict(self)})


def instance_fields(instances: str, fields: Mapping[str, Any] | None = None) -> NucleusFields | None:
    """What a configuration's ``instances`` means: None for ``tiles``, the fields for ``nuclei``.

    Args:
        instances: ``tiles`` or ``nuclei``.
        fields: arguments of `NucleusFields`; None for the defaults.

    Raises:
        TableError: another word, or fields that `NucleusFields` does not take.
    """
    if instances not in ("tiles", "nuclei"):
        raise TableError(f"instances is {instances!r}; it must be 'tiles' or 'nuclei'")
    try:
        chosen = NucleusFields(**(fields or {}))
    except (TypeError, ValueError) as error:
        raise TableError(f"fields {dict(fields or {})}: {error}") from error
    return chosen if instances == "nuclei" else None


def nucleus_fields(index: TileIndex, index_path: Path, fields: NucleusFields | None) -> TileIndex:
    """The index itself where ``fields`` is None, else the fields of the nuclei that lie beside it.

    Raises:
        TableError: where the nuclei are missing or damaged, of another slide, or none.
    """
    return index if fields is None else fields.of(index, NucleusTable.read(nuclei_path(index_path)))
