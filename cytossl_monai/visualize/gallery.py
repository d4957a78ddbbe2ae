"""The cells that decided: the leading tiles with their nuclei outlined and their scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from skimage.measure import find_contours
from skimage.segmentation import find_boundaries

from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.transforms.nuclei.instances import segment_instances
from cytossl_monai.utils.files import atomic_path
from cytossl_monai.visualize.overlay import nice_length

__all__ = ["GalleryTile", "draw_gallery", "outline_nuclei", "read_gallery"]

_OUTLINE = np.array((0, 190, 90), np.uint8)
_INK = (33, 37, 41)
_FAINT = (108, 117, 125)
_FINEST = 0.25
"""Micrometres per pixel of the gallery's pictures, where the slide has it: chromatin shows."""


@dataclass(frozen=True)
class GalleryTile:
    """One tile of the gallery.

    Args:
        image: (3, H, W) uint8.
        mpp: micrometres per pixel of ``image``.
        labels: (H, W) int32, its nuclei; 0 is background.
        nuclei: what was measured on them, see ``transforms.nuclei.table.TABLE_COLUMNS``.
        x: column of its corner, level-0 pixels.
        y: row of its corner, level-0 pixels.
        size: its side, level-0 pixels.
        attention: its share of the attention times the number of tiles: 1 is average.
        score: suspicion of the tile alone, in [0, 1].
    """

    image: np.ndarray
    mpp: float
    labels: np.ndarray
    nuclei: pd.DataFrame
    x: int
    y: int
    size: int
    attention: float
    score: float

    @cached_property
    def contours(self) -> list[np.ndarray]:
        """Outlines of the nuclei, in the table's order: (K, 2) float, x and y in pixels from the image's corner."""
        found = []
        boxes = ndimage.find_objects(self.labels)
        for label in self.nuclei["label"]:
            rows, columns = boxes[int(label) - 1]
            inside = np.pad(self.labels[rows, columns] == label, 1)
            ring = max(find_contours(inside, 0.5), key=len)
            # Index 1 of the padded box is the centre of the box's first pixel, half a pixel from its corner.
            found.append(ring[:, ::-1] - 0.5 + (columns.start, rows.start))
        return found

    @property
    def largest_um2(self) -> float | None:
        """Area of the largest nucleus, square micrometres; None where no nucleus was outlined."""
        return float(self.nuclei["area_um2"].max()) if len(self.nuclei) else None


def read_gallery(
    slide: Slide, index: TileIndex, attention: np.ndarray, score: np.ndarray, rows: np.ndarray
) -> list[GalleryTile]:
    """Read tiles of an index for the gallery, at the slide's own resolution or 0.25 um/px, and find their nuclei.

    Args:
        slide: the open slide.
        index: its tiles.
        attention: (N,), sums to one.
        score: (N,) in [0, 1].
        rows: which tiles, best first.
    """
    if not len(rows):
        return []
    size = int(index.table["size"].iloc[0])
    mpp = min(index.mpp, max(_FINEST, slide.mpp))
    side = max(1, round(size * slide.mpp / mpp))
    images = np.asarray(slide.read_regions(index.coords[rows], side, mpp, damaged="glass"))
    tiles = []
    for image, row in zip(images, rows):
        nuclei = segment_instances(image, mpp)
        x, y = (int(v) for v in index.coords[row])
        relative = float(attention[row] * len(index))
        tiles.append(GalleryTile(image, mpp, nuclei.labels, nuclei.table, x, y, size, relative, float(score[row])))
    return tiles


def outline_nuclei(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draw the outlines of the nuclei, just outside of them: the nuclei's own pixels stay as they are.

    Args:
        image: (3, H, W) uint8.
        labels: (H, W) int32, 0 is background.

    Returns:
        (3, H, W) uint8.
    """
    edge = find_boundaries(labels, mode="outer") & (labels == 0)
    out = image.copy()
    out[:, edge] = _OUTLINE[:, None]
    return out


def draw_gallery(
    path: str | os.PathLike[str],
    tiles: Sequence[GalleryTile],
    title: str,
    columns: int = 5,
    side: int = 256,
    kind: str = "tile",
) -> Path:
    """Draw the gallery.

    Args:
        path: PNG to write.
        tiles: best first; none gives a picture that says so.
        title: line above.
        columns: tiles in a row.
        side: of a tile, pixels of the picture.
        kind: what the bag is made of, ``tile`` or ``cell``.

    Returns:
        the path written.
    """
    path = Path(path)
    font, small = ImageFont.load_default(20), ImageFont.load_default(14)
    gap, caption, head, foot = 14, 42, 76, 40
    columns = max(2, min(columns, len(tiles)))
    rows = max(1, -(-len(tiles) // columns))
    size = (columns * (side + gap) + gap, head + rows * (side + caption + gap) + foot)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 14), title, _INK, font)
    draw.text((gap, 44), f"Leading {kind}s, strongest first. Research use only, not for diagnosis.", _FAINT, small)
    if not tiles:
        draw.text((gap, head + 20), "no cells found", _INK, font)
    for rank, tile in enumerate(tiles):
        x = gap + rank % columns * (side + gap)
        y = head + rank // columns * (side + caption + gap)
        picture = Image.fromarray(np.ascontiguousarray(outline_nuclei(tile.image, tile.labels).transpose(1, 2, 0)))
        canvas.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        figures = f"suspicion {tile.score:.2f}   attention {tile.attention:.1f}x"
        draw.text((x, y + side + 4), f"{kind} {rank + 1}", _INK, small)
        draw.text((x + side - draw.textlength(figures, font=small), y + side + 4), figures, _FAINT, small)
        draw.text((x, y + side + 21), f"x {tile.x}, y {tile.y}", _FAINT, small)
    if tiles:
        um_per_pixel = tiles[0].image.shape[-1] * tiles[0].mpp / side
        length = nice_length(side * um_per_pixel / 3)
        base = size[1] - 26
        draw.rectangle((gap, base, gap + length / um_per_pixel, base + 4), _INK)
        # Pillow's own font has no micro sign.
        draw.text((gap + length / um_per_pixel + 8, base - 7), f"{length:g} um", _INK, small)
    with atomic_path(path) as partial:
        canvas.save(partial, format="PNG", compress_level=4)
    return path
