"""Halving and doubling images: sums of shifted copies, which on a CPU are several times as fast as torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["double", "halve"]


def halve(image: Tensor) -> Tensor:
    """Means of blocks of 2 x 2 pixels; an odd border is repeated.

    Args:
        image: (B, C, H, W) floating point.

    Returns:
        (B, C, ceil(H / 2), ceil(W / 2)).
    """
    height, width = image.shape[-2:]
    if height % 2 or width % 2:
        image = F.pad(image, (0, width % 2, 0, height % 2), mode="replicate")
    rows = image[..., ::2, :] + image[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)


def double(image: Tensor, height: int, width: int) -> Tensor:
    """Enlarge by two, bilinearly, as ``interpolate`` does with ``align_corners=False``.

    Args:
        image: (B, C, h, w) floating point.
        height: rows to return, at most 2 h.
        width: columns to return, at most 2 w.

    Returns:
        (B, C, height, width); a view of something larger where less is asked for.
    """
    batch, channels, rows, columns = image.shape
    # Columns first, while there are few rows: they are written with gaps, which is slow.
    wide = torch.empty(batch, channels, rows, columns, 2, dtype=image.dtype, device=image.device)
    torch.lerp(image[..., 1:], image[..., :-1], 0.25, out=wide[..., 1:, 0])
    torch.lerp(image[..., :-1], image[..., 1:], 0.25, out=wide[..., :-1, 1])
    wide[..., 0, 0], wide[..., -1, 1] = image[..., 0], image[..., -1]
    wide = wide.view(batch, channels, rows, 2 * columns)
    tall = torch.empty(batch, channels, rows, 2, 2 * columns, dtype=image.dtype, device=image.device)
    torch.lerp(wide[:, :, 1:], wide[:, :, :-1], 0.25, out=tall[:, :, 1:, 0])
    torch.lerp(wide[:, :, :-1], wide[:, :, 1:], 0.25, out=tall[:, :, :-1, 1])
    tall[:, :, 0, 0], tall[:, :, -1, 1] = wide[:, :, 0], wide[:, :, -1]
    return tall.view(batch, channels, 2 * rows, 2 * columns)[..., :height, :width]
