"""Resampling of regions to any resolution with exact source rectangles: area averaging down, cubic up."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from scipy import sparse

__all__ = ["axis_weights", "resample", "resample_cuda", "window_size"]

_PAD = 2
"""Source pixels on either side of a window: the reach of the cubic kernel."""


def window_size(size: int, scale: float) -> int:
    """Source pixels to read along one axis so that ``size`` output pixels of ``scale`` source pixels find their own."""
    return int(np.ceil(size * scale - 1e-9)) + 1 + 2 * _PAD


def axis_weights(size: int, scale: float, offset: float, window: int) -> sparse.csr_array:
    """Weights of one axis: output pixel j covers the source interval from ``offset + j * scale``, ``scale`` long.

    With ``scale >= 1`` a source pixel weighs by its overlap with that interval (exact area averaging); below 1 the
    Catmull-Rom cubic is evaluated at the interval's centre (Keys, IEEE TASSP 1981, a = -0.5).

    Args:
        size: output pixels.
        scale: source pixels per output pixel.
        offset: start of output pixel 0, in pixels of the window (its pixel i covers [i, i + 1]).
        window: source pixels; taps beyond either end are clamped to it.

    Returns:
        (size, window) sparse float32, rows sum to one.
    """
    start = offset + scale * np.arange(size)
    if scale >= 1:
        taps = int(np.ceil(scale)) + 1
        first = np.floor(start + 1e-9).astype(np.int64)
        index = first[:, None] + np.arange(taps)
        overlap = np.minimum(start[:, None] + scale, index + 1) - np.maximum(start[:, None], index)
        weight = np.clip(overlap, 0, None)
    else:
        centre = start + scale / 2 - 0.5
        first = np.floor(centre).astype(np.int64) - 1
        index = first[:, None] + np.arange(4)
        distance = np.abs(centre[:, None] - index)
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    weight = weight / weight.sum(1, keepdims=True)
    index = np.clip(index, 0, window - 1)
    taps = index.shape[1]
    return sparse.csr_array(
        (weight.astype(np.float32).ravel(), index.ravel(), np.arange(0, size * taps + 1, taps)), shape=(size, window)
    )


def _offsets(starts: np.ndarray) -> np.ndarray:
    return starts - np.floor(starts) + _PAD


def window_corners(starts: np.ndarray) -> np.ndarray:
    """Top-left source pixel (N, 2) int64 of the windows for regions that begin at ``starts`` (N, 2) float."""
    return np.floor(starts).astype(np.int64) - _PAD


@lru_cache(maxsize=64)
def _rows_matrix(size: int, scale: float, offset: float, window: int) -> sparse.csr_array:
    """`axis_weights`, kept: a grid of tiles has few offsets, and to make the weights costs as much as to use them."""
    return axis_weights(size, scale, offset, window)


@lru_cache(maxsize=64)
def _columns_matrix(size: int, scale: float, offset: float, window: int) -> sparse.csr_array:
    """Weights along x for interleaved RGB: row ``c * size + j`` takes channel c, so planes come out of the product."""
    one = axis_weights(size, scale, offset, window)
    planes = [sparse.csr_array((one.data, one.indices * 3 + c, one.indptr), shape=(size, 3 * window)) for c in range(3)]
    return sparse.csr_array(sparse.vstack(planes, format="csr"))


def resample(
    windows: np.ndarray, starts: np.ndarray, size: tuple[int, int], scale: float, out: np.ndarray | None = None
) -> np.ndarray:
    """Resample windows to regions.

    Args:
        windows: (N, h, w, 3) uint8, cut at `window_corners` with `window_size`.
        starts: (N, 2) float, (x, y) of the regions' corners in source pixels.
        size: (width, height) of the regions.
        scale: source pixels per output pixel.
        out: where to write to; None makes a new array.

    Returns:
        (N, 3, height, width) uint8, ``out`` where it was given.
    """
    width, height = size
    count, source_h, source_w, _ = windows.shape
    if out is None:
        out = np.empty((count, 3, height, width), np.uint8)
    pixels = np.empty((source_h, 3 * source_w), np.float32)
    for i, (dx, dy) in enumerate(_offsets(starts)):
        np.copyto(pixels, windows[i].reshape(source_h, -1))
        rows = _rows_matrix(height, scale, round(float(dy), 6), source_h) @ pixels
        done = _columns_matrix(width, scale, round(float(dx), 6), source_w) @ np.ascontiguousarray(rows.T)
        np.rint(done, out=done)
        if scale < 1:
            np.clip(done, 0, 255, out=done)  # the cubic overshoots; an average never does
        # Planes are turned as bytes, which are four times fewer than floats.
        out[i] = done.astype(np.uint8).reshape(3, width, height).transpose(0, 2, 1)
    return out


def resample_cuda(windows: Any, starts: np.ndarray, size: tuple[int, int], scale: float) -> Any:
    """`resample` for a CUDA tensor (N, h, w, 3) uint8, as two batched matrix products; (N, 3, height, width) uint8."""
    import torch

    width, height = size
    _, source_h, source_w, _ = windows.shape
    offsets = _offsets(starts)
    by_x = np.stack([axis_weights(width, scale, float(dx), source_w).toarray() for dx in offsets[:, 0]])
    by_y = np.stack([axis_weights(height, scale, float(dy), source_h).toarray() for dy in offsets[:, 1]])
    horizontal = torch.from_numpy(by_x).to(windows.device)
    vertical = torch.from_numpy(by_y).to(windows.device)
    pixels = windows.permute(0, 3, 1, 2).float()
    done = vertical[:, None] @ pixels @ horizontal[:, None].transpose(-1, -2)
    return done.round_().clamp_(0, 255).to(torch.uint8)
