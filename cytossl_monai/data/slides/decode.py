"""Parts of reading a slide: which source pixels a region needs, what glass looks like, and decoding around damage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cytossl_monai.data.slides.readers.base import Backend, BackendError
from cytossl_monai.data.slides.readers.tifffile import TiffFileBackend
from cytossl_monai.data.slides.resample import window_corners, window_size

__all__ = ["concatenate", "decode_around_damage", "glass_colour", "source_windows", "spread"]


def source_windows(starts: np.ndarray, size: tuple[int, int], scale: float) -> tuple[np.ndarray, tuple[int, int], bool]:
    """The source pixels that regions need.

    Args:
        starts: (N, 2) float, (x, y) of the regions' corners in pixels of the level.
        size: (width, height) of the regions.
        scale: pixels of the level per pixel of the region.

    Returns:
        corners (N, 2) int64 and (width, height) of the windows to decode; whether they are the regions themselves.
    """
    if abs(scale - 1) * max(size) < 0.25:
        # At the level's own resolution a half-pixel shift is better than the blur of interpolating it away.
        return np.rint(starts).astype(np.int64), size, True
    return window_corners(starts), (window_size(size[0], scale), window_size(size[1], scale)), False


def concatenate(parts: list[Any], axis: int) -> Any:
    """Join arrays, or tensors."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis)
    import torch

    return torch.cat(parts, axis)


def spread(images: Any, where: np.ndarray, glass: np.ndarray) -> Any:
    """Images (n, 3, h, w) put to the n places where ``where`` (N,) is true, the others in the colour of glass."""
    shape = (len(where), *images.shape[1:])
    if isinstance(images, np.ndarray):
        full = np.empty(shape, np.uint8)
        full[:] = glass[:, None, None]
        full[where] = images
        return full
    import torch

    tensor = torch.from_numpy(glass.copy()).to(images.device)[:, None, None].repeat(len(where), 1, *shape[2:])
    tensor[torch.from_numpy(where).to(images.device)] = images
    return tensor


def decode_around_damage(
    reopen: Callable[[], Backend],
    level: int,
    level_dimensions: list[tuple[int, int]],
    corners: np.ndarray,
    size: tuple[int, int],
    fill: np.ndarray,
) -> np.ndarray:
    """Windows of one level, tile by tile where the file has a table of tiles, else each for itself; on the host.

    Args:
        reopen: gives the usual reader anew: some read nothing more after an error.
        level: the level.
        level_dimensions: (width, height) of each level.
        corners: (N, 2) int64, (x, y) of the windows in pixels of the level.
        size: (width, height) of the windows.
        fill: (3,) uint8, what stands where nothing can be decoded.

    Returns:
        (N, height, width, 3) uint8.
    """
    handle = reopen()
    try:
        careful = TiffFileBackend(handle.path)
    except BackendError:
        careful = None
    if careful is not None and careful.level_dimensions == level_dimensions:
        handle.close()
        careful.leave_out_damaged = True
        try:
            return careful.read(level, corners, size, fill)
        finally:
            careful.close()
    out = np.empty((len(corners), size[1], size[0], 3), np.uint8)
    out[:] = fill
    for i in range(len(corners)):
        try:
            out[i] = handle.read(level, corners[i : i + 1], size, fill)[0]
        except BackendError:
            handle.close()
            handle = reopen()
    handle.close()
    return out


def glass_colour(image: np.ndarray) -> np.ndarray:
    """The colour of clear glass: the most common brightness in the bright half, and the median colour around it.

    Args:
        image: (3, h, w) uint8, a thumbnail.

    Returns:
        (3,) uint8. Of an image without a bright pixel, the colour of its brightest twentieth.
    """
    pixels = image.reshape(3, -1)
    brightness = pixels.mean(0)
    bright = brightness >= 128
    if not bright.any():
        return np.median(pixels[:, brightness >= np.percentile(brightness, 95)], axis=1).astype(np.uint8)
    histogram = np.bincount(brightness[bright].astype(np.int64), minlength=256).astype(np.float64)
    smooth = np.convolve(histogram, np.ones(5) / 5, mode="same")
    near = np.abs(brightness - (smooth.argmax() + 0.5)) <= 3.5
    return np.median(pixels[:, near], axis=1).astype(np.uint8)
