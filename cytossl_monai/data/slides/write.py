"""Write an image as a pyramidal TIFF."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile

from cytossl_monai.utils.files import atomic_path

__all__ = ["write_pyramid"]


def write_pyramid(
    path: str | os.PathLike[str], rgb: np.ndarray, mpp: float, description: str = "", tile: int = 256
) -> Path:
    """Write an image as a tiled, pyramidal JPEG TIFF that cuCIM, OpenSlide and tifffile open, atomically.

    Args:
        path: the file.
        rgb: (H, W, 3) uint8.
        mpp: micrometres per pixel, written as the resolution.
        description: text for the first page, ASCII.
        tile: side of the TIFF's tiles, pixels, a multiple of 16.

    Returns:
        the path written.
    """
    path = Path(path)
    with atomic_path(path) as partial_path, tifffile.TiffWriter(partial_path, bigtiff=True) as tif:
        for number, level in enumerate(_levels(rgb, 2 * tile)):
            per_cm = 1e4 / (mpp * 2**number)
            tif.write(
                level,
                subfiletype=0 if number == 0 else 1,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                tile=(tile, tile),
                compression="jpeg",
                compressionargs={"level": 90},
                photometric="rgb",
                description=(description or None) if number == 0 else None,
                metadata=None,
            )
    return path


def _levels(rgb: np.ndarray, smallest: int) -> Iterator[np.ndarray]:
    level = np.ascontiguousarray(rgb)
    while True:
        yield level
        if min(level.shape[:2]) <= smallest:
            return
        h, w = level.shape[0] // 2 * 2, level.shape[1] // 2 * 2
        total = level[0:h:2, 0:w:2].astype(np.uint16)
        for dy, dx in ((0, 1), (1, 0), (1, 1)):
            total += level[dy:h:2, dx:w:2]
        level = ((total + 2) // 4).astype(np.uint8)
