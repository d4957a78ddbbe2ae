"""Nuclei of the proposed tiles, counted at a moderate resolution in large blocks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from cytossl_monai.data.foreground import Grid, _near_level, tile_means
from cytossl_monai.data.slides import Slide
from cytossl_monai.transforms.nuclei_mask import nuclear_density, nuclei_mask

__all__ = ["TileNuclei", "count_nuclei"]

_BLOCK_UM = 640.0
_MARGIN_UM = 18.0
"""Context around a block: what the kernel's background estimate reaches."""


@dataclass(frozen=True)
class TileNuclei:
    """Nuclei of every tile of the grid, (rows, columns); 0 where a tile was not looked at.

    Args:
        count: int64, nuclei whose centre lies in the tile.
        fraction: float32, share of the tile inside nuclei.
        sharpness: float32, steepest edge of a nucleus over its contrast, per micrometre, median of the tile's nuclei.
    """

    count: np.ndarray
    fraction: np.ndarray
    sharpness: np.ndarray


def count_nuclei(
    slide: Slide,
    grid: Grid,
    wanted: np.ndarray,
    mpp: float,
    min_area_um2: float,
    min_contrast: float,
    num_threads: int = 1,
) -> TileNuclei:
    """Count the nuclei of the wanted tiles.

    Neighbouring tiles are read as one block with context around it, and each nucleus counts once, for the tile that
    holds its centre.

    Args:
        slide: open slide; on its ``device`` the kernel runs.
        grid: its tiles.
        wanted: (rows, columns) bool.
        mpp: micrometres per pixel to look at, about 1; the slide's own where that is coarser.
        min_area_um2: least area of a nucleus, square micrometres.
        min_contrast: optical density by which a nucleus must exceed its surroundings.
        num_threads: blocks worked on at once.

    Returns:
        counts, shares and sharpness of the wanted tiles.
    """
    mpp = _near_level(slide, mpp)
    shape = (grid.rows, grid.columns)
    found = TileNuclei(np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    blocks = list(_blocks(grid, wanted, max(1, round(_BLOCK_UM / (grid.size * slide.mpp)))))

    def work(block: tuple[int, int, int, int]) -> None:
        torch.set_num_threads(1)  # of this thread: the blocks are what runs side by side
        _count_block(slide, grid, block, mpp, min_area_um2, min_contrast, wanted, found)

    if num_threads <= 1 or len(blocks) < 2:
        for block in blocks:
            _count_block(slide, grid, block, mpp, min_area_um2, min_contrast, wanted, found)
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(work, blocks))
    return found


def _blocks(grid: Grid, wanted: np.ndarray, side: int) -> Iterator[tuple[int, int, int, int]]:
    """Top, bottom, left, right (tiles) of blocks of at most ``side`` x ``side`` tiles, trimmed to the wanted ones."""
    for top in range(0, grid.rows, side):
        for left in range(0, grid.columns, side):
            rows, columns = np.nonzero(wanted[top : top + side, left : left + side])
            if len(rows):
                yield (
                    top + int(rows.min()),
                    top + int(rows.max()) + 1,
                    left + int(columns.min()),
                    left + int(columns.max()) + 1,
                )


def _count_block(
    slide: Slide,
    grid: Grid,
    block: tuple[int, int, int, int],
    mpp: float,
    min_area_um2: float,
    min_contrast: float,
    wanted: np.ndarray,
    found: TileNuclei,
) -> None:
    top, bottom, left, right = block
    scale = mpp / slide.mpp
    margin = round(_MARGIN_UM / slide.mpp)
    x0, y0 = left * grid.size - margin, top * grid.size - margin
    width = int(np.ceil(((right - left) * grid.size + 2 * margin) / scale))
    height = int(np.ceil(((bottom - top) * grid.size + 2 * margin) / scale))
    pixels = slide.read_regions(np.array([[x0, y0]]), (width, height), mpp=mpp)
    images = torch.as_tensor(pixels)
    mask = nuclei_mask(images, mpp, min_contrast=min_contrast)[0, 0].cpu().numpy()
    labels, count = ndimage.label(mask)
    if not count:
        return
    density = nuclear_density(images)[0, 0].cpu().numpy()
    nuclei = _describe(labels, count, density, mpp)
    kept = nuclei.area_um2 >= min_area_um2
    row = np.floor((y0 + (nuclei.y + 0.5) * scale) / grid.size).astype(np.int64)
    column = np.floor((x0 + (nuclei.x + 0.5) * scale) / grid.size).astype(np.int64)
    kept &= (row >= top) & (row < bottom) & (column >= left) & (column < right)
    real = np.zeros(count + 1, bool)
    real[1:] = nuclei.area_um2 >= min_area_um2
    fraction = tile_means(real[labels], scale, (x0, y0), grid, (top, bottom), (left, right))
    ask = wanted[top:bottom, left:right]
    found.fraction[top:bottom, left:right] = fraction * ask
    for r, c in {(int(r), int(c)) for r, c in zip(row[kept], column[kept])}:
        if wanted[r, c]:
            inside = kept & (row == r) & (column == c)
            found.count[r, c] = int(inside.sum())
            found.sharpness[r, c] = float(np.median(nuclei.sharpness[inside]))


@dataclass(frozen=True)
class _Nuclei:
    area_um2: np.ndarray
    x: np.ndarray
    y: np.ndarray
    sharpness: np.ndarray


def _describe(labels: np.ndarray, count: int, density: np.ndarray, mpp: float) -> _Nuclei:
    """Area, centre and sharpness of each label, from its own pixels alone."""
    rows, columns = np.nonzero(labels)
    which = labels[rows, columns] - 1
    area = np.bincount(which, minlength=count)
    y = np.bincount(which, rows, count) / area
    x = np.bincount(which, columns, count) / area
    slope_y, slope_x = np.gradient(density)
    slope = np.hypot(slope_y, slope_x)[rows, columns] / mpp
    steepest, darkest = np.zeros(count), np.zeros(count)
    np.maximum.at(steepest, which, slope)
    np.maximum.at(darkest, which, density[rows, columns])
    return _Nuclei(area * mpp**2, x, y, steepest / np.maximum(darkest, 1e-3))
