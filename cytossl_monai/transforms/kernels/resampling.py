"""Halving and doubling images: sums of shifted copies, which on a CPU are several times as fast as torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["double", "halve", "shifted"]


def shifted(padded: Tensor, dim: int, length: int) -> Tensor:
    """All stretches of some length along a dimension, as a view.

    Args:
        padded: (B, C, H, W).
        dim: 2 or 3.
        length: of a stretch, at most that of ``padded``.

    Returns:
        (k, B, C, H, W) with ``length`` rows (or columns), the first of which is the first, second, ... of ``padded``.
    """
    stretches = padded.unfold(dim, length, 1).movedim(dim, 0)
    return stretches.transpose(-1, -2) if dim == 2 else stretches


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
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    # Columns first, while there are few rows: they are written with gaps, which is slow.
    left, middle, right = shifted(padded, 3, columns).unbind()
    wide = torch.empty(batch, channels, rows + 2, columns, 2, dtype=image.dtype, device=image.device)
    torch.lerp(middle, left, 0.25, out=wide[..., 0])
    torch.lerp(middle, right, 0.25, out=wide[..., 1])
    above_and_below = shifted(wide.view(batch, channels, rows + 2, 2 * columns), 2, rows)
    tall = torch.empty(batch, channels, rows, 2, 2 * columns, dtype=image.dtype, device=image.device)
    torch.lerp(above_and_below[1].unsqueeze(3), above_and_below[::2].movedim(0, 3), 0.25, out=tall)
    return tall.view(batch, channels, 2 * rows, 2 * columns)[..., :height, :width]
