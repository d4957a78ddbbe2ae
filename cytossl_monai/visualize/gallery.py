"""The cells that decided: the leading tiles with their nuclei outlined and their scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.segmentation import find_boundaries

from cytossl_monai.transforms.nuclei import segment_instances
from cytossl_monai.utils.files import atomic_path
from cytossl_monai.visualize.overlay import nice_length

__all__ = ["GalleryTile", "draw_gallery", "outline_nuclei"]

_OUTLINE = np.array((0, 190, 90), np.uint8)
_INK = (33, 37, 41)


@dataclass(frozen=True)
class GalleryTile:
    """One tile of the gallery.

    Args:
        image: (3, H, W) uint8.
        outlined: (3, H, W) uint8, with the nuclei's outlines.
        n_nuclei: nuclei found.
        x: column of its corner, level-0 pixels.
        y: row of its corner, level-0 pixels.
        attention: its share of the attention times the number of tiles: 1 is average.
        score: suspicion of the tile alone, in [0, 1].
    """

    image: np.ndarray
    outlined: np.ndarray
    n_nuclei: int
    x: int
    y: int
    attention: float
    score: float


def outline_nuclei(image: np.ndarray, mpp: float) -> tuple[np.ndarray, int]:
    """Draw the outlines of the nuclei, just outside of them: the nuclei's own pixels stay as they are.

    Args:
        image: (3, H, W) uint8.
        mpp: micrometres per pixel.

    Returns:
        (3, H, W) uint8 and the number of nuclei.
    """
    found = segment_instances(image, mpp, table=False)
    edge = find_boundaries(found.labels, mode="outer") & (found.labels == 0)
    out = image.copy()
    out[:, edge] = _OUTLINE[:, None]
    return out, len(found)


def draw_gallery(
    path: str | os.PathLike[str], tiles: Sequence[GalleryTile], mpp: float, title: str, columns: int = 4
) -> Path:
    """Draw the gallery.

    Args:
        path: PNG to write.
        tiles: best first; none gives a picture that says so.
        mpp: micrometres per pixel of the tiles.
        title: line above.
        columns: tiles in a row.

    Returns:
        the path written.
    """
    path = Path(path)
    font, small = ImageFont.load_default(20), ImageFont.load_default(14)
    side = tiles[0].image.shape[-1] if tiles else 224
    gap, caption, head = 12, 24, 48
    columns = max(2, min(columns, len(tiles)))
    rows = max(1, -(-len(tiles) // columns))
    size = (columns * (side + gap) + gap, head + rows * (side + caption + gap) + gap + 24)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 14), title, _INK, font)
    if not tiles:
        draw.text((gap, head + 20), "no cells found", _INK, font)
    for rank, tile in enumerate(tiles):
        x = gap + rank % columns * (side + gap)
        y = head + rank // columns * (side + caption + gap)
        canvas.paste(Image.fromarray(np.ascontiguousarray(tile.outlined.transpose(1, 2, 0))), (x, y))
        told = f"{rank + 1}   {tile.attention:.1f} x mean   score {tile.score:.2f}"
        draw.text((x, y + side + 4), told, _INK, small)
    length = nice_length(side * mpp / 3)
    base = size[1] - 22
    draw.rectangle((gap, base, gap + length / mpp, base + 4), _INK)
    draw.text((gap + length / mpp + 8, base - 8), f"{length:g} µm", _INK, small)
    with atomic_path(path) as partial:
        canvas.save(partial, format="PNG")
    return path
