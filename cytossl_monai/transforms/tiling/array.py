"""Slides in other people's MONAI pipelines: `LoadSlide`, `TileSlide`, `LoadTile` and their dictionary versions.

``Compose([LoadSlided("image"), TileSlided("image"), LoadTiled("image")])`` turns ``{"image": path}`` into a list of
dictionaries whose ``image`` is a MetaTensor. What passes between `TileSlide` and `LoadTile` are plain numbers and
strings, so that PersistentDataset and spawned workers can store and send them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils.enums import WSIPatchKeys

from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.pool import SlidePool
from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.data.tiles.index_file import TileIndex

__all__ = ["LoadSlide", "LoadTile", "TileSlide", "tile_affine", "tiles_from_index"]

_BATCH = 64


def tile_affine(x: float, y: float, slide_mpp: float, mpp: float) -> torch.Tensor:
    """Affine of a tile: (row, column, 0, 1) of a pixel's centre to (y, x, 0, 1) on the slide in micrometres.

    Args:
        x: column of the tile's corner, level-0 pixels.
        y: row of the tile's corner, level-0 pixels.
        slide_mpp: micrometres per level-0 pixel.
        mpp: micrometres per pixel of the tile.

    Returns:
        (4, 4) float64. The slide's own top-left corner is the origin.
    """
    affine = torch.diag(torch.tensor([mpp, mpp, 1.0, 1.0], dtype=torch.float64))
    affine[0, 3] = y * slide_mpp + mpp / 2
    affine[1, 3] = x * slide_mpp + mpp / 2
    return affine


def tiles_from_index(index: TileIndex) -> list[dict[str, Any]]:
    """The rows of a tile index as items for `LoadTile`."""
    levels = index.table["level"].to_numpy()
    return [
        _item(str(index.slide_path), x, y, index.tile_size, index.mpp, index.level0_mpp, level)
        for (x, y), level in zip(index.coords, levels)
    ]


def _item(path: str, x: int, y: int, size: int, mpp: float, slide_mpp: float, level: int) -> dict[str, Any]:
    return {
        "path": path,
        "x": int(x),
        "y": int(y),
        "size": int(size),
        "mpp": float(mpp),
        "slide_mpp": float(slide_mpp),
        "level": int(level),
    }


class LoadSlide(Transform):
    """Open a slide. Nothing is read yet; the `Slide` is picklable and reopens itself in another process.

    Args:
        backend: as for `open_slide`.
        mpp: micrometres per pixel of level 0, overriding the file; None takes the file's.
        device: as for `open_slide`.
    """

    def __init__(self, backend: str = "auto", mpp: float | None = None, device: str = "cpu") -> None:
        self.backend = backend
        self.mpp = mpp
        self.device = device

    def __call__(self, data: str | os.PathLike[str], mpp: float | None = None) -> Slide:
        """Open ``data``; ``mpp`` overrides the one given to the constructor.

        Raises:
            SlideError: as `open_slide`.
        """
        mpp = self.mpp if mpp is None else mpp
        return open_slide(data, backend=self.backend, mpp=mpp, device=self.device)  # type: ignore[arg-type]


class TileSlide(Transform):
    """Cut a slide into tile items, without reading the tiles.

    Args:
        tile_size: side of a tile in pixels at ``mpp``.
        mpp: micrometres per pixel of the tiles; None for the slide's own.
        overlap: share of a tile's side that it has in common with its neighbour, in [0, 1).
        mode: ``"grid"``: every place of the grid; ``"nuclei"``: those where at least ``min_nuclei_fraction`` of the
            tile is nucleus by `nuclei_mask` (tiles are read for that, in batches; blank glass is skipped unread).
        min_nuclei_fraction: share of a tile's area, for ``mode="nuclei"``.
        min_darkness: grey levels by which a spot of the overview must be darker than glass to be looked at.
        partial: keep tiles that hang over the right or lower border (filled with glass), so that all is covered.

    Raises:
        ValueError: for a tile size below 1, an overlap outside [0, 1) or an unknown mode.
    """

    def __init__(
        self,
        tile_size: int = 224,
        mpp: float | None = 0.5,
        overlap: float = 0.0,
        mode: Literal["grid", "nuclei"] = "grid",
        min_nuclei_fraction: float = 0.002,
        min_darkness: float = 8.0,
        partial: bool = True,
    ) -> None:
        if tile_size < 1 or not 0 <= overlap < 1:
            raise ValueError(f"tile_size must be >= 1 and overlap in [0, 1), but are {tile_size} and {overlap}")
        if mode not in ("grid", "nuclei"):
            raise ValueError(f"mode must be grid or nuclei, but is {mode!r}")
        self.tile_size = tile_size
        self.mpp = mpp
        self.overlap = overlap
        self.mode = mode
        self.min_nuclei_fraction = min_nuclei_fraction
        self.min_darkness = min_darkness
        self.partial = partial

    def __call__(self, data: Slide) -> list[dict[str, Any]]:
        """Items ``path, x, y, size, mpp, slide_mpp, level``: x, y level-0 pixels, ``size`` pixels at ``mpp``."""
        mpp = data.mpp if self.mpp is None else self.mpp
        side = self.tile_size * mpp / data.mpp
        step = max(1.0, side * (1 - self.overlap))
        xs, ys = (self._starts(length, side, step) for length in (data.width, data.height))
        places = np.array([(x, y) for y in ys for x in xs], np.int64).reshape(-1, 2)
        if self.mode == "nuclei" and len(places):
            places = places[self._foreground(data, places, side)]
            places = places[self._with_nuclei(data, places, mpp)]
        level = data.best_level(mpp)
        return [_item(str(data.path), x, y, self.tile_size, mpp, data.mpp, level) for x, y in places]

    def _starts(self, length: int, side: float, step: float) -> np.ndarray:
        last = length - 1 if self.partial else length - side + 1e-6
        starts = np.arange(0, max(last, 0) + 1e-9, step) if last >= 0 else np.empty(0)
        if self.partial and len(starts) > 1 and starts[-2] + side >= length:
            starts = starts[:-1]
        return np.rint(starts).astype(np.int64)

    def _foreground(self, slide: Slide, places: np.ndarray, side: float) -> np.ndarray:
        """Which tiles have a spot darker than glass on an overview of about 8 px a tile side."""
        shrink = max(1.0, side / 8)
        overview = slide.thumbnail(max(1, int(max(slide.width, slide.height) / shrink))).astype(np.float32)
        shrink = slide.width / overview.shape[2]
        dark = (slide.glass.astype(np.float32)[:, None, None] - overview).max(0) >= self.min_darkness
        integral = np.pad(dark.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        x0, y0 = (np.floor(places[:, i] / shrink).astype(int) for i in (0, 1))
        x1 = np.minimum(np.ceil((places[:, 0] + side) / shrink).astype(int), dark.shape[1])
        y1 = np.minimum(np.ceil((places[:, 1] + side) / shrink).astype(int), dark.shape[0])
        x0, y0 = np.minimum(x0, x1), np.minimum(y0, y1)
        found: np.ndarray = integral[y1, x1] - integral[y0, x1] - integral[y1, x0] + integral[y0, x0] > 0
        return found

    def _with_nuclei(self, slide: Slide, places: np.ndarray, mpp: float) -> np.ndarray:
        from cytossl_monai.transforms.nuclei.mask import nuclei_mask

        keep = np.zeros(len(places), bool)
        for start in range(0, len(places), _BATCH):
            tiles = torch.as_tensor(slide.read_regions(places[start : start + _BATCH], self.tile_size, mpp))
            share = nuclei_mask(tiles, mpp).float().mean((1, 2, 3))
            keep[start : start + _BATCH] = (share >= self.min_nuclei_fraction).cpu().numpy()
        return keep


class LoadTile(Transform):
    """Read the tile of an item as a MetaTensor (3, size, size) uint8.

    Its ``meta`` hold ``x`` and ``y`` (level-0 pixels), ``location`` (the same as MONAI's readers have it: row,
    column), ``size``, ``level``, ``mpp``, ``slide_mpp``, ``path``, ``filename_or_obj``; its ``affine`` is
    `tile_affine`.

    Args:
        max_open: slides that are kept open; see `SlidePool`.
        backend: as for `open_slide`.
        device: as for `open_slide`.
    """

    def __init__(self, max_open: int = 16, backend: str = "auto", device: str = "cpu") -> None:
        self.pool = SlidePool(max_open, backend, device)

    def __call__(self, data: Mapping[str, Any]) -> MetaTensor:
        """Read the tile.

        Raises:
            SlideError: as `open_slide` and `Slide.read_region`.
        """
        slide = self.pool.get(data["path"], data.get("slide_mpp"))
        size, mpp = int(data["size"]), float(data["mpp"])
        pixels = torch.as_tensor(slide.read_region(data["x"], data["y"], size, mpp))
        meta = {
            "x": int(data["x"]),
            "y": int(data["y"]),
            WSIPatchKeys.LOCATION.value: np.array([data["y"], data["x"]]),
            WSIPatchKeys.SIZE.value: np.array([size, size]),
            "level": slide.best_level(mpp),
            "mpp": mpp,
            "slide_mpp": slide.mpp,
            "path": str(slide.path),
            "filename_or_obj": str(slide.path),
            "original_channel_dim": 0,
            "spatial_shape": (size, size),
        }
        affine = tile_affine(data["x"], data["y"], slide.mpp, mpp)
        return MetaTensor(pixels, affine=affine, meta=meta)
