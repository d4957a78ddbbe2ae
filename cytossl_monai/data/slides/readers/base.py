"""What a slide reading library has to offer: level sizes, a resolution, and pixels of one level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cytossl_monai.data.slides.resolution import Resolution

__all__ = ["Backend", "BackendError", "level_downsamples"]


class BackendError(Exception):
    """A library cannot open or decode a file. `open_slide` turns what all of them say into one SlideError."""


def level_downsamples(dimensions: list[tuple[int, int]]) -> list[float]:
    """Level-0 pixels per pixel of each level, from the level sizes (w, h).

    Scanners halve and drop the odd row: a level of 14,211 rows below 28,423 is exactly 2, not 2.00007, which over a
    whole slide makes a difference of many pixels. Where the sizes fit no integer, it is the mean of both axes.
    """
    width, height = dimensions[0]
    found = []
    for w, h in dimensions:
        ratio = (width / w + height / h) / 2
        whole = round(ratio)
        fits = whole >= 1 and all(
            part in (full // whole, -(-full // whole)) for full, part in ((width, w), (height, h))
        )
        # Repeated halving of odd sizes drops up to one pixel a step: one more pixel of slack at the coarse levels.
        near = whole >= 4 and abs(width / whole - w) < 1.5 and abs(height / whole - h) < 1.5 and not whole & (whole - 1)
        found.append(float(whole) if fits or near else ratio)
    return found


class Backend(ABC):
    """An open file. Handles are neither picklable nor safe across processes: `data.slides.slide.Slide` sees to that.

    Args:
        path: the file.

    Attributes:
        level_dimensions: (width, height) of each level, full resolution first.
        resolution: micrometres per pixel of level 0 as the file states them.
    """

    name: ClassVar[str]
    suffixes: ClassVar[frozenset[str] | None] = None
    """Suffixes that the backend is tried on; None for all."""

    level_dimensions: list[tuple[int, int]]
    resolution: Resolution

    def __init__(self, path: Path) -> None:
        self.path = path

    bounds_offset: tuple[int, ...] = (0, 0)
    """x, y of the scanned part within level 0, to which QuPath crops a slide (``openslide.bounds-x``, MRXS)."""

    @abstractmethod
    def read(
        self, level: int, locations: np.ndarray, size: tuple[int, int], fill: np.ndarray, num_workers: int = 0
    ) -> np.ndarray:
        """Read equally large regions of one level.

        Args:
            level: index into ``level_dimensions``.
            locations: (N, 2) int64, (x, y) of the top-left corners in pixels OF THE LEVEL. A region may lie partly
                or wholly outside; what is read there is up to the backend, the caller overwrites it.
            size: (width, height) in pixels of the level.
            fill: (3,) uint8, the colour of pixels inside the level that the scanner never saw (MRXS).
            num_workers: decoding threads, where the library has them.

        Returns:
            (N, height, width, 3) uint8.

        Raises:
            BackendError: when the pixels cannot be decoded.
        """

    def read_blocks(
        self, level: int, locations: np.ndarray, size: tuple[int, int], fill: np.ndarray, num_workers: int = 0
    ) -> Iterator[np.ndarray]:
        """What `read` returns, in pieces and in order: a caller that converts each while it is warm copies less.

        Yields:
            (k, height, width, 3) uint8, whose memory may be read-only and is valid until the next piece.

        Raises:
            BackendError: when the pixels cannot be decoded.
        """
        yield self.read(level, locations, size, fill, num_workers)

    def read_cuda(self, level: int, locations: np.ndarray, size: tuple[int, int], num_workers: int = 0) -> Any:
        """The same decoded on the GPU: (N, height, width, 3) uint8 CUDA tensor, or None where not supported."""
        del level, locations, size, num_workers
        return None

    @abstractmethod
    def close(self) -> None:
        """Close the file. Closing twice is fine."""


def paste_inside(out: np.ndarray, image: np.ndarray, origin: tuple[int, int], location: tuple[int, int]) -> None:
    """Copy the overlap of ``image`` (h, w, 3), whose corner lies at ``origin``, into ``out``, cornered at ``location``.

    Both corners are (x, y) in one coordinate system; pixels of ``out`` without a counterpart stay as they are.
    """
    (ox, oy), (lx, ly) = origin, location
    left, top = max(ox, lx), max(oy, ly)
    right, bottom = min(ox + image.shape[1], lx + out.shape[1]), min(oy + image.shape[0], ly + out.shape[0])
    if left < right and top < bottom:
        out[top - ly : bottom - ly, left - lx : right - lx] = image[top - oy : bottom - oy, left - ox : right - ox]
