"""Nuclei of the proposed tiles, counted at a moderate resolution in large blocks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.data.tiles.nuclei_file import NUCLEUS_COLUMNS
from cytossl_monai.index.low_power import Grid, near_level, tile_means
from cytossl_monai.transforms.nuclei.mask import nuclear_density, nuclei_mask

__all__ = ["NucleusRules", "TileNuclei", "count_nuclei"]

_BLOCK_UM = 640.0
_MARGIN_UM = 18.0
"""Context around a block: what the kernel's background estimate reaches."""


_SMALL_UM2 = 300.0
"""Only things smaller than this are judged by their shape: larger ones are nuclei that touch, in chains as well."""


@dataclass(frozen=True)
class NucleusRules:
    """What of the kernel's mask counts as a nucleus.

    Args:
        min_area_um2: least area, square micrometres.
        min_contrast: optical density by which it exceeds its surroundings.
        min_edge: optical density per micrometre at its steepest edge; smears, mucus and cells far out of focus have
            less.
        max_elongation: length over width; threads and fibres have more.
    """

    min_area_um2: float = 10.0
    min_contrast: float = 0.06
    min_edge: float = 0.05
    max_elongation: float = 4.0


@dataclass(frozen=True)
class TileNuclei:
    """Nuclei of every tile of the grid, (rows, columns); 0 where a tile was not looked at.

    Args:
        count: int64, nuclei whose centre lies in the tile.
        fraction: float32, share of the tile inside nuclei.
        sharpness: float32, steepest edge of a nucleus over its density, per micrometre, median of the tile's nuclei.
        parts: tables of the nuclei themselves, with ``row`` and ``column`` of the tile; see `TileNuclei.table`.
    """

    count: np.ndarray
    fraction: np.ndarray
    sharpness: np.ndarray
    parts: list[pd.DataFrame] = field(default_factory=list)

    def table(self, kept: np.ndarray) -> pd.DataFrame:
        """Nuclei whose tile is kept, by tile and place, however the work was spread over threads.

        Args:
            kept: (rows, columns) bool.

        Returns:
            the columns of `NUCLEUS_COLUMNS`.
        """
        if not self.parts:
            return pd.DataFrame({name: np.zeros(0, dtype) for name, dtype in NUCLEUS_COLUMNS.items()})
        nuclei = pd.concat(self.parts, ignore_index=True)
        nuclei = nuclei[kept[nuclei["row"], nuclei["column"]]]
        return nuclei.sort_values(["row", "column", "y", "x"], ignore_index=True)[list(NUCLEUS_COLUMNS)]


def count_nuclei(
    slide: Slide,
    grid: Grid,
    wanted: np.ndarray,
    mpp: float,
    rules: NucleusRules,
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
        rules: what counts as a nucleus.
        num_threads: blocks worked on at once.

    Returns:
        counts, shares and sharpness of the wanted tiles.
    """
    mpp = near_level(slide, mpp)
    shape = (grid.rows, grid.columns)
    found = TileNuclei(np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    blocks = list(_blocks(grid, wanted, max(1, round(_BLOCK_UM / (grid.size * slide.mpp)))))

    def work(block: tuple[int, int, int, int]) -> None:
        _count_block(slide, grid, block, mpp, rules, wanted, found)

    if num_threads <= 1 or len(blocks) < 2:
        for block in blocks:
            work(block)
        return found
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the blocks run side by side, each on one core
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(work, blocks))
    finally:
        torch.set_num_threads(before)
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
    rules: NucleusRules,
    wanted: np.ndarray,
    found: TileNuclei,
) -> None:
    top, bottom, left, right = block
    scale = mpp / slide.mpp
    margin = round(_MARGIN_UM / slide.mpp)
    x0, y0 = left * grid.size - margin, top * grid.size - margin
    width = int(np.ceil(((right - left) * grid.size + 2 * margin) / scale))
    height = int(np.ceil(((bottom - top) * grid.size + 2 * margin) / scale))
    pixels = slide.read_regions(np.array([[x0, y0]]), (width, height), mpp=mpp, damaged="glass")
    images = torch.as_tensor(pixels)
    mask = nuclei_mask(images, mpp, min_contrast=rules.min_contrast)[0, 0].cpu().numpy()
    labels, count = ndimage.label(mask)
    if not count:
        return
    density = nuclear_density(images)[0, 0].cpu().numpy()
    nuclei = _describe(labels, count, density, mpp)
    real = (nuclei.area_um2 >= rules.min_area_um2) & (nuclei.edge >= rules.min_edge)
    real &= (nuclei.area_um2 >= _SMALL_UM2) | (nuclei.elongation <= rules.max_elongation)
    row = np.floor((y0 + (nuclei.y + 0.5) * scale) / grid.size).astype(np.int64)
    column = np.floor((x0 + (nuclei.x + 0.5) * scale) / grid.size).astype(np.int64)
    here = real & (row >= top) & (row < bottom) & (column >= left) & (column < right)
    mask = np.concatenate([[False], real])[labels]
    fraction = tile_means(mask, scale, (x0, y0), grid, (top, bottom), (left, right))
    ask = wanted[top:bottom, left:right]
    asked = np.flatnonzero(here)[wanted[row[here], column[here]]]
    part = {"row": row[asked], "column": column[asked], "area_um2": nuclei.area_um2[asked]}
    part |= {"x": x0 + (nuclei.x[asked] + 0.5) * scale, "y": y0 + (nuclei.y[asked] + 0.5) * scale}
    part |= {"density": nuclei.density[asked], "elongation": nuclei.elongation[asked]}
    found.parts.append(pd.DataFrame(part))
    found.fraction[top:bottom, left:right] = fraction * ask
    for r, c in {(int(r), int(c)) for r, c in zip(row[here], column[here])}:
        if wanted[r, c]:
            inside = here & (row == r) & (column == c)
            found.count[r, c] = int(inside.sum())
            found.sharpness[r, c] = float(np.median(nuclei.sharpness[inside]))


@dataclass(frozen=True)
class _Nuclei:
    area_um2: np.ndarray
    x: np.ndarray
    y: np.ndarray
    elongation: np.ndarray
    density: np.ndarray
    edge: np.ndarray
    sharpness: np.ndarray


def _describe(labels: np.ndarray, count: int, density: np.ndarray, mpp: float) -> _Nuclei:
    """Size, place, shape and edge of each label, from its own pixels alone."""
    rows, columns = np.nonzero(labels)
    which = labels[rows, columns] - 1
    area = np.bincount(which, minlength=count)
    y, x = np.bincount(which, rows, count) / area, np.bincount(which, columns, count) / area
    # Elongation of the ellipse of the same second moments; a pixel has a twelfth of its own.
    dy, dx = rows - y[which], columns - x[which]
    yy, xx, xy = (np.bincount(which, product, count) / area for product in (dy * dy, dx * dx, dy * dx))
    mean, apart = (yy + xx) / 2 + 1 / 12, np.hypot((yy - xx) / 2, xy)
    slope_y, slope_x = np.gradient(density)
    edge, darkest = np.zeros(count), np.zeros(count)
    np.maximum.at(edge, which, np.hypot(slope_y, slope_x)[rows, columns] / mpp)
    np.maximum.at(darkest, which, density[rows, columns])
    return _Nuclei(
        area_um2=area * mpp**2,
        x=x,
        y=y,
        elongation=np.sqrt((mean + apart) / np.maximum(mean - apart, 1e-6)),
        density=np.bincount(which, density[rows, columns], count) / area,
        edge=edge,
        sharpness=edge / np.maximum(darkest, 1e-3),
    )
