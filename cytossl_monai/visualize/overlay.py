"""The slide at low power under its heatmap, with a scale bar and a legend."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from cytossl_monai.utils.files import atomic_path
from cytossl_monai.visualize.heatmap import TileMap, colours, rgba

__all__ = ["blend", "draw_overlay", "nice_length"]

_INK = (33, 37, 41)
_MARGIN = 64


def nice_length(limit: float) -> float:
    """The largest of 1, 2, 5 x 10^n that does not exceed ``limit`` (micrometres)."""
    power = 10.0 ** np.floor(np.log10(limit))
    return float(max(step * power for step in (1, 2, 5) if step * power <= limit * (1 + 1e-9)))


def blend(thumbnail: np.ndarray, heat: TileMap) -> Image.Image:
    """The map multiplied onto a thumbnail of the slide: what is dark stays dark, so that nuclei show through.

    Args:
        thumbnail: (3, h, w) uint8, the whole slide.
        heat: the map.

    Returns:
        RGB picture of the thumbnail's size.
    """
    picture = Image.fromarray(np.ascontiguousarray(thumbnail.transpose(1, 2, 0)))
    layer = Image.fromarray(rgba(heat.values))
    # The cells cover whole tiles, so the last ones hang over the slide's edge: cut what lies on the slide.
    box = (0, 0, heat.width / heat.cell, heat.height / heat.cell)
    layer = layer.resize(picture.size, Image.Resampling.NEAREST, box=box)
    return Image.composite(ImageChops.multiply(picture, layer.convert("RGB")), picture, layer.getchannel("A"))


def draw_overlay(
    path: str | os.PathLike[str],
    thumbnail: np.ndarray,
    heat: TileMap,
    title: str,
    legend: str = "attention",
    max_size: int = 1600,
) -> Path:
    """Draw the overlay.

    Args:
        path: PNG to write.
        thumbnail: (3, h, w) uint8, the whole slide.
        heat: the map.
        title: line above the picture.
        legend: what the colours mean.
        max_size: longer side of the slide's picture, pixels; a larger thumbnail is brought down to it.

    Returns:
        the path written.
    """
    path = Path(path)
    shrink = max(thumbnail.shape[1:]) / max_size
    if shrink > 1:
        size = max(1, round(thumbnail.shape[2] / shrink)), max(1, round(thumbnail.shape[1] / shrink))
        picture = Image.fromarray(np.ascontiguousarray(thumbnail.transpose(1, 2, 0)))
        thumbnail = np.asarray(picture.resize(size, Image.Resampling.BOX)).transpose(2, 0, 1)
    over = blend(thumbnail, heat)
    width = max(over.width, 480)
    canvas = Image.new("RGB", (width, over.height + 2 * _MARGIN), "white")
    canvas.paste(over, ((width - over.width) // 2, _MARGIN))
    draw = ImageDraw.Draw(canvas)
    font, small = ImageFont.load_default(22), ImageFont.load_default(16)
    draw.text((16, 20), title, _INK, font)
    um_per_pixel = heat.width * heat.mpp / over.width
    length = nice_length(um_per_pixel * over.width / 4)
    bar = length / um_per_pixel
    base = over.height + _MARGIN + 22
    left = (width - over.width) // 2 + 16
    draw.rectangle((left, base, left + bar, base + 6), _INK)
    # Pillow's own font has no micro sign.
    told = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} um"
    draw.text((left, base + 12), told, _INK, small)
    texts = {text: draw.textlength(text, font=small) for text in ("low", legend, "high")}
    wide = max(180, int(sum(texts.values())) + 24)  # room for all three under it
    ramp = colours(np.repeat(np.linspace(0, 1, wide)[None], 14, 0))
    right = width - (width - over.width) // 2 - wide - 16
    canvas.paste(Image.fromarray(ramp), (right, base - 4))
    middle = texts["low"] + (wide - sum(texts.values())) / 2
    for text, at in (("low", 0.0), (legend, middle), ("high", wide - texts["high"])):
        draw.text((right + at, base + 14), text, _INK, small)
    with atomic_path(path) as partial:
        canvas.save(partial, format="PNG", compress_level=4)
    return path
