"""The picture of an index: the slide at low power with its kept tiles drawn on it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.utils.files import atomic_path

__all__ = ["draw_overview"]

_COLOUR = (214, 39, 40)


def draw_overview(path: str | os.PathLike[str], slide: Slide, index: TileIndex, max_size: int = 1600) -> Path:
    """Draw the kept tiles on a thumbnail of the slide; the more nuclei, the stronger the tint.

    Args:
        path: PNG to write.
        slide: the open slide.
        index: its tiles.
        max_size: longer side of the picture, pixels.

    Returns:
        the path written.
    """
    path = Path(path)
    picture = Image.fromarray(np.ascontiguousarray(slide.thumbnail(max_size).transpose(1, 2, 0)))
    scale = picture.width / slide.width
    layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    most = max(1.0, float(index.table["n_nuclei"].quantile(0.95)) if len(index) else 1.0)
    for x, y, size, n in index.table[["x", "y", "size", "n_nuclei"]].itertuples(index=False):
        corner = (x * scale, y * scale)
        tint = int(20 + 60 * min(1.0, n / most))
        draw.rectangle((corner, ((x + size) * scale, (y + size) * scale)), (*_COLOUR, tint), (*_COLOUR, 170))
    picture = Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")
    with atomic_path(path) as partial:
        picture.save(partial, format="PNG")
    return path
