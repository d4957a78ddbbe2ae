"""What each attention head of the last layer looks at, as colours on the tile and as numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from cytossl_monai.networks.blocks.background import foreground_patches
from cytossl_monai.utils.files import atomic_path

__all__ = ["class_attention", "draw_attention_heads", "head_masses", "paint_heads", "tissue_parts"]

_COLOURS = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)], np.float32)
_INK = (33, 37, 41)


@torch.no_grad()
def class_attention(encoder: nn.Module, images: Tensor) -> Tensor:
    """What the class token of the last layer gives each patch, head by head.

    Args:
        encoder: an ``Encoder`` of an SR-Transformer with a class token (its normalisation is applied), or the network.
        images: (B, 3, H, W) as the encoder takes them.

    Returns:
        (B, h, rows, columns) float32; each head sums to one over the patches (what it gave prefix tokens is left out).

    Raises:
        ValueError: for a network without attention or without a class token.
    """
    network: Any = getattr(encoder, "network", encoder)
    blocks: Any = getattr(network, "blocks", None)
    if blocks is None or not hasattr(blocks[-1].attn, "save_attn") or not getattr(network, "has_class_token", False):
        raise ValueError(
            f"{type(network).__name__} has no class token whose attention could be drawn: give an SR-Transformer that "
            "has one"
        )
    attention, was_training = blocks[-1].attn, encoder.training
    saved = attention.save_attn
    attention.save_attn = True
    try:
        encoder.eval()(images)
        weights = attention.att_mat[:, :, 0, network.num_prefix :].float()
    finally:
        attention.save_attn, attention.att_mat = saved, None
        encoder.train(was_training)
    normalise: Any = getattr(encoder, "normalise", None)
    seen = images if normalise is None else normalise(images[:1])[0]  # brought down to the input size
    grid = network.grid_size(int(seen.shape[-2]), int(seen.shape[-1]))
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
    return weights.unflatten(-1, grid)


def tissue_parts(images: Tensor, nuclei: Tensor, threshold: float = 0.06) -> dict[str, Tensor]:
    """The three parts of a tile: nuclei, cytoplasm (what is neither nucleus nor glass) and glass.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        nuclei: (B, 1, H, W) bool.
        threshold: optical density against the glass up to which a pixel counts as glass.

    Returns:
        ``nuclei``, ``cytoplasm`` and ``glass``: (B, 1, H, W) bool, each pixel in one of them.
    """
    dense = foreground_patches(images, (1, 1), threshold, on_blank="darkest")
    dense = dense.view(len(images), 1, *images.shape[-2:])
    return {"nuclei": nuclei, "cytoplasm": dense & ~nuclei, "glass": ~dense & ~nuclei}


def head_masses(attention: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How much of its attention each head spends on each part of the tile.

    A patch's attention counts for the parts by the share of its pixels that each covers. The second figure of a part,
    ``<part>_gain``, divides its mass by the part's area: 1 is what a head has that looks everywhere alike.

    Args:
        attention: (B, h, rows, columns), each head summing to one.
        parts: masks (B, 1, H, W) by name, H and W multiples of rows and columns.

    Returns:
        for each part ``<part>`` and ``<part>_gain``, (B, h) float32; a gain is NaN where the part is absent.
    """
    rows, columns = attention.shape[-2:]
    figures: dict[str, Tensor] = {}
    for name, mask in parts.items():
        share = F.adaptive_avg_pool2d(mask.to(attention), (rows, columns))
        mass = (attention * share).sum((-2, -1))
        area = share.mean((-2, -1))
        figures[name] = mass
        figures[f"{name}_gain"] = torch.where(area > 0, mass / area, float("nan"))
    return figures


def paint_heads(
    image: np.ndarray, attention: np.ndarray, heads: Sequence[int] = (0, 1, 2), share: float = 0.15
) -> np.ndarray:
    """A tile in grey with the strongest patches of some heads over it, a colour a head.

    Args:
        image: (3, H, W) uint8.
        attention: (h, rows, columns).
        heads: which, at most six: red, green, blue, yellow, magenta, cyan.
        share: part of the patches of each head that are shown, in (0, 1].

    Returns:
        (3, H, W) uint8; where heads meet their colours add.

    Raises:
        ValueError: for heads that are not there, more than six, or a share out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if not heads or len(heads) > len(_COLOURS) or min(heads) < 0 or max(heads) >= len(attention):
        raise ValueError(f"heads are {list(heads)}; allowed are one to six of the {len(attention)} heads, from 0 on")
    height, width = image.shape[1:]
    count = max(1, round(share * attention[0].size))
    layer = np.zeros((3, height, width), np.float32)
    strength = np.zeros((height, width), np.float32)
    for colour, head in zip(_COLOURS, heads):
        weights = attention[head]
        bar = np.partition(weights.ravel(), weights.size - count)[weights.size - count]
        shown = np.where(weights >= bar, weights / max(float(weights.max()), 1e-12), 0.0).astype(np.float32)
        large = np.asarray(Image.fromarray(shown).resize((width, height), Image.Resampling.NEAREST))
        layer += colour[:, None, None] * large
        strength = np.maximum(strength, large)
    grey = image.astype(np.float32).mean(0, keepdims=True).repeat(3, 0) / 255
    painted = grey * (1 - 0.7 * strength) + 0.7 * strength * np.clip(layer, 0, 1)
    return np.rint(255 * np.clip(painted, 0, 1)).astype(np.uint8)


def draw_attention_heads(
    path: str | os.PathLike[str],
    images: np.ndarray,
    attentions: Mapping[str, np.ndarray],
    heads: Sequence[int] = (0, 1, 2),
    share: float = 0.15,
) -> Path:
    """A row a tile: the tile itself, then beside one another what the heads of several encoders look at.

    Args:
        path: PNG to write.
        images: (n, 3, H, W) uint8.
        attentions: (n, h, rows, columns) by the name of the encoder, in the order of the columns.
        heads: which heads, see :func:`paint_heads`.
        share: see :func:`paint_heads`.

    Returns:
        the path written.
    """
    path = Path(path)
    height, width = images.shape[2:]
    gap, top = 8, 32
    names = ["tile", *attentions]
    canvas = Image.new("RGB", (len(names) * (width + gap) + gap, top + len(images) * (height + gap)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for column, name in enumerate(names):
        draw.text((gap + column * (width + gap), 8), name, _INK, font)
        for row, image in enumerate(images):
            shown = image if column == 0 else paint_heads(image, attentions[name][row], heads, share)
            picture = Image.fromarray(np.ascontiguousarray(shown.transpose(1, 2, 0)))
            canvas.paste(picture, (gap + column * (width + gap), top + row * (height + gap)))
    with atomic_path(path) as partial:
        canvas.save(partial, format="PNG", compress_level=4)
    return path
