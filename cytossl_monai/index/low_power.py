"""Where on a slide to look: its tiles at low power, against its own glass, without ink."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from cytossl_monai.data.slides.slide import Slide

__all__ = ["Grid", "InkRules", "LowPower", "find_ink", "look_at_low_power", "near_level", "tile_means"]

_BAND_PIXELS = 1 << 22


@dataclass(frozen=True)
class Grid:
    """Tiles that cover a slide, row by row from its top-left corner; the last ones may hang over its border.

    Args:
        size: side of a tile, level-0 pixels.
        columns: tiles across.
        rows: tiles down.
    """

    size: int
    columns: int
    rows: int

    @classmethod
    def over(cls, slide: Slide, size: int) -> Grid:
        """The grid of tiles of ``size`` level-0 pixels over a slide."""
        return cls(size, -(-slide.width // size), -(-slide.height // size))


@dataclass(frozen=True)
class InkRules:
    """What counts as a pen mark: ink of a colour that no stain has, or anything very saturated or very dark, if large.

    Args:
        green: optical density by which red and blue must both be absorbed more than green. No stain of cytology does.
        saturation: optical density between the most and the least absorbed channel.
        darkness: optical density of the least absorbed channel.
        stroke_um: width of the thinnest stroke, micrometres; thinner things are cells.
        area_mm2: least area of a mark, square millimetres.
        margin_um: what is left out around a mark, micrometres.
    """

    green: float = 0.25
    saturation: float = 0.75
    darkness: float = 0.75
    stroke_um: float = 60.0
    area_mm2: float = 0.04
    margin_um: float = 40.0


@dataclass(frozen=True)
class LowPower:
    """What a slide looks like at low power, one value a tile of the grid, (rows, columns).

    Args:
        foreground: float32, share of the tile that is not glass.
        dark: float32, share of the tile that is dark enough for a nucleus.
        ink: float32, share of the tile under a pen mark.
        unseen: bool, part of the tile could not be decoded at this power.
    """

    foreground: np.ndarray
    dark: np.ndarray
    ink: np.ndarray
    unseen: np.ndarray


def look_at_low_power(
    slide: Slide,
    grid: Grid,
    mpp: float,
    foreground_density: float,
    nuclear_density: float,
    ink_rules: InkRules,
    num_threads: int = 1,
) -> LowPower:
    """Look over a whole slide at low power, a band at a time, so that memory does not grow with the slide.

    Args:
        slide: open slide.
        grid: its tiles.
        mpp: micrometres per pixel to look at; the slide's own where that is coarser.
        foreground_density: optical density against the slide's glass from which on a pixel is foreground.
        nuclear_density: the same in red and in green, from which on a pixel may belong to a nucleus.
        ink_rules: what is a pen mark.
        num_threads: decoding threads.

    Returns:
        shares for every tile of the grid.
    """
    mpp = near_level(slide, mpp)
    scale = mpp / slide.mpp
    width, height = max(1, int(np.ceil(slide.width / scale))), max(1, int(np.ceil(slide.height / scale)))
    table = _density_table(slide.glass)
    rows_at_once = max(1, int(_BAND_PIXELS / max(1.0, width * grid.size / scale)))
    ink = np.zeros((height, width), bool)
    foreground = np.zeros((grid.rows, grid.columns), np.float32)
    dark = np.zeros_like(foreground)
    for first in range(0, grid.rows, rows_at_once):
        last = min(first + rows_at_once, grid.rows)
        top, bottom = round(first * grid.size / scale), min(round(last * grid.size / scale), height)
        if bottom <= top:
            continue
        pixels = slide.read_regions(
            np.array([[0, round(top * scale)]]), (width, bottom - top), mpp, num_threads, damaged="glass"
        )[0]
        pixels = pixels if isinstance(pixels, np.ndarray) else pixels.cpu().numpy()
        red, green, blue = (table[channel][pixels[channel]] for channel in range(3))
        ink[top:bottom] = _inky(red, green, blue, ink_rules)
        seen = np.maximum(np.maximum(red, green), blue) > foreground_density
        offset = (0.0, top * scale)
        foreground[first:last] = tile_means(seen, scale, offset, grid, (first, last), (0, grid.columns))
        nuclear = np.minimum(red, green) > nuclear_density
        dark[first:last] = tile_means(nuclear, scale, offset, grid, (first, last), (0, grid.columns))
    marks = find_ink(ink, mpp, ink_rules)
    covered = tile_means(marks, scale, (0.0, 0.0), grid, (0, grid.rows), (0, grid.columns))
    return LowPower(foreground, dark, covered, _unseen(slide, grid, mpp, scale, num_threads))


def _unseen(slide: Slide, grid: Grid, mpp: float, scale: float, num_threads: int) -> np.ndarray:
    """Which tiles touch damage at low power; a level of full size is not decoded twice for it."""
    if slide.best_level(mpp) == 0:
        return np.zeros((grid.rows, grid.columns), bool)
    rows, columns = np.divmod(np.arange(grid.rows * grid.columns), grid.columns)
    side = max(1, round(grid.size / scale))
    sound = slide.sound(np.stack([columns, rows], 1) * grid.size, side, mpp, num_threads)
    return ~sound.reshape(grid.rows, grid.columns)


def find_ink(inky: np.ndarray, mpp: float, rules: InkRules) -> np.ndarray:
    """Pen marks: inky pixels that form something broad and large, and what lies close to it.

    Args:
        inky: (h, w) bool, pixels of ink's colour or darkness.
        mpp: micrometres per pixel.
        rules: what counts.

    Returns:
        (h, w) bool.
    """
    if not inky.any():
        return np.zeros_like(inky)
    core = ndimage.distance_transform_edt(np.pad(inky, 1, mode="edge"))[1:-1, 1:-1] * mpp > rules.stroke_um / 2
    if not core.any():
        return np.zeros_like(inky)
    labels, count = ndimage.label(inky, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1) * mpp**2 / 1e6
    broad = np.zeros(count + 1, bool)
    broad[np.unique(labels[core])] = True
    keep = broad & (areas >= rules.area_mm2)
    keep[0] = False
    marks = keep[labels]
    if not marks.any():
        return marks
    return ndimage.distance_transform_edt(~marks) * mpp <= rules.margin_um


def tile_means(
    image: np.ndarray,
    scale: float,
    offset: tuple[float, float],
    grid: Grid,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> np.ndarray:
    """Mean of an image over each tile, counting as 0 what the image does not cover.

    Args:
        image: (h, w), numbers or truth values.
        scale: level-0 pixels per pixel of the image.
        offset: x and y of the image's top-left corner, level-0 pixels.
        grid: the tiles.
        rows: first and one past the last row of tiles.
        columns: the same for columns.

    Returns:
        (rows, columns) float32.
    """
    sums = np.add.reduceat(
        np.pad(image, ((0, 1), (0, 1))).astype(np.float32),
        _edges(image.shape[0], scale, offset[1], grid.size, rows),
        axis=0,
    )[:-1]
    sums = np.add.reduceat(sums, _edges(image.shape[1], scale, offset[0], grid.size, columns), axis=1)[:, :-1]
    return (sums / (grid.size / scale) ** 2).clip(0, 1).astype(np.float32)


def _edges(length: int, scale: float, offset: float, size: int, span: tuple[int, int]) -> np.ndarray:
    """Pixel at which each tile begins (its centre is the first inside), and where the last one ends."""
    edges = np.ceil((np.arange(span[0], span[1] + 1) * size - offset) / scale - 0.5).astype(np.int64)
    return edges.clip(0, length)


def near_level(slide: Slide, mpp: float) -> float:
    """``mpp``, or that of a level within 15 % of it: reading a level as it is costs less than resampling."""
    mpp = max(mpp, slide.mpp)
    levels = [slide.mpp * d for d in slide.level_downsamples]
    nearest = min(levels, key=lambda m: abs(np.log(m / mpp)))
    return nearest if abs(np.log(nearest / mpp)) < 0.15 else mpp


def _density_table(glass: np.ndarray) -> np.ndarray:
    """(3, 256) float32: optical density (log10) of each grey level against the glass, at least 0."""
    level = np.arange(256, dtype=np.float32).clip(1)
    return np.log10(np.maximum(glass.astype(np.float32), 1)[:, None] / level).clip(0)


def _inky(red: np.ndarray, green: np.ndarray, blue: np.ndarray, rules: InkRules) -> np.ndarray:
    low = np.minimum(np.minimum(red, green), blue)
    high = np.maximum(np.maximum(red, green), blue)
    foreign = np.minimum(red, blue) - green > rules.green
    return foreign | (high - low > rules.saturation) | (low > rules.darkness)
