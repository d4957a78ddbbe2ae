"""Tile values as a map of the slide, in colour, and as a pyramidal TIFF that viewers lay over the slide."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from cytossl_monai.utils.files import atomic_path

__all__ = ["TileMap", "colours", "display_scale", "on_white", "rgba", "tile_map", "write_heatmap_tiff"]

_STOPS = np.array(
    [(0.0, 66, 30, 115), (0.25, 128, 39, 129), (0.5, 205, 64, 113), (0.75, 249, 135, 70), (1.0, 252, 230, 110)]
)
"""Dark violet to bright yellow: even in brightness, readable for the colour-blind, and unlike any cytology stain."""

_TIFF_SIDE = 4096


@dataclass(frozen=True)
class TileMap:
    """One value a tile, laid out as the tiles lie on the slide.

    Args:
        values: (rows, columns) float32 in [0, 1], NaN where there is no tile.
        cell: side of a cell, level-0 pixels.
        width: of the slide, level-0 pixels.
        height: of the slide, level-0 pixels.
        mpp: micrometres per level-0 pixel.
    """

    values: np.ndarray
    cell: int
    width: int
    height: int
    mpp: float


def display_scale(values: np.ndarray) -> np.ndarray:
    """Values (N,) >= 0 to [0, 1] for display: relative to the 99.5th percentile, by square root.

    Attention sums to one over thousands of tiles and a few hold most of it; the root keeps the second rank visible.
    """
    if not len(values):
        return np.zeros(0, np.float32)
    top = float(np.percentile(values, 99.5))
    top = top if top > 0 else float(values.max())
    if top <= 0:
        return np.zeros(len(values), np.float32)
    return np.sqrt(np.clip(values / top, 0, 1)).astype(np.float32)


def tile_map(coords: np.ndarray, values: np.ndarray, cell: int, width: int, height: int, mpp: float) -> TileMap:
    """Lay values out. A tile counts for the cell that holds its centre; where tiles share a cell the largest stays.

    Args:
        coords: (N, 2) x, y of the tiles' corners, level-0 pixels.
        values: (N,) in [0, 1].
        cell: side of a tile, level-0 pixels.
        width: of the slide.
        height: of the slide.
        mpp: micrometres per level-0 pixel.
    """
    rows, columns = max(1, -(-height // cell)), max(1, -(-width // cell))
    grid = np.full((rows, columns), -np.inf, np.float32)
    if len(coords):
        centre = np.clip((np.asarray(coords) + cell / 2) // cell, 0, (columns - 1, rows - 1)).astype(int)
        np.maximum.at(grid, (centre[:, 1], centre[:, 0]), np.asarray(values, np.float32))
    return TileMap(np.where(np.isinf(grid), np.nan, grid).astype(np.float32), cell, width, height, mpp)


def colours(values: np.ndarray) -> np.ndarray:
    """Colours of values in [0, 1] (NaN: black): (..., 3) uint8."""
    flat = np.nan_to_num(np.asarray(values, np.float64))
    channels = [np.interp(flat, _STOPS[:, 0], _STOPS[:, i]) for i in (1, 2, 3)]
    rgb = np.rint(np.stack(channels, -1)).astype(np.uint8)
    rgb[np.isnan(values)] = 0
    return rgb


def rgba(values: np.ndarray) -> np.ndarray:
    """Colours with alpha, (..., 4) uint8: hardly there for small values, strong for large, nothing where NaN."""
    alpha = np.where(np.isnan(values), 0, 40 + 180 * np.nan_to_num(values))
    return np.concatenate([colours(values), np.rint(alpha)[..., None].astype(np.uint8)], -1)


def write_heatmap_tiff(path: str | os.PathLike[str], heat: TileMap, downsample: int | None = None) -> Path:
    """Write the map as a tiled, pyramidal RGB TIFF in the slide's frame, with its resolution.

    White where there is no tile and paler for small values: a viewer lays it over the slide by multiplication or at
    half opacity. OpenSlide and cuCIM open it as a slide of its own.

    Args:
        path: the file.
        heat: the map.
        downsample: level-0 pixels per pixel of the picture; None takes a power of two from 4 that keeps the longer side
            at 4096 pixels or less, so that memory does not grow with the slide.

    Returns:
        the path written.
    """
    path = Path(path)
    if downsample is None:
        downsample = 2 ** max(2, math.ceil(math.log2(max(heat.width, heat.height) / _TIFF_SIDE)))
    width, height = max(1, -(-heat.width // downsample)), max(1, -(-heat.height // downsample))
    rows = np.minimum((np.arange(height) + 0.5) * downsample // heat.cell, heat.values.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(width) + 0.5) * downsample // heat.cell, heat.values.shape[1] - 1).astype(int)
    cells = on_white(heat.values)
    levels = [(rows, columns)]
    while max(len(levels[-1][0]), len(levels[-1][1])) > 256:
        levels.append((levels[-1][0][::2], levels[-1][1][::2]))
    with atomic_path(path) as partial, tifffile.TiffWriter(partial) as tiff:
        for i, (level_rows, level_columns) in enumerate(levels):
            per_cm = 1e4 / (heat.mpp * downsample * 2**i)
            tiff.write(
                cells[level_rows][:, level_columns],
                subfiletype=int(i > 0),
                tile=(256, 256),
                photometric="rgb",
                compression="lzw",
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


def on_white(values: np.ndarray) -> np.ndarray:
    """Colours as they look on white paper, (..., 3) uint8: white where NaN, pale for small values."""
    found = rgba(values).astype(np.float32)
    share = found[..., 3:] / 255
    return np.rint(255 * (1 - share) + found[..., :3] * share).astype(np.uint8)
