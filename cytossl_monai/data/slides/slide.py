"""Whole slides, by whatever library can really decode the file: regions at any resolution, in batches, picklable."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cytossl_monai.data.slides.readers.base import Backend, BackendError, level_downsamples
from cytossl_monai.data.slides.readers.cucim import CuCIMBackend
from cytossl_monai.data.slides.readers.frame import FrameBackend
from cytossl_monai.data.slides.readers.openslide import OpenSlideBackend
from cytossl_monai.data.slides.readers.tifffile import TiffFileBackend
from cytossl_monai.data.slides.resample import resample, resample_cuda, window_corners, window_size
from cytossl_monai.utils.errors import SlideError

__all__ = ["BACKENDS", "LEVEL_TOLERANCE", "Slide", "SlideError"]

BACKENDS: dict[str, type[Backend]] = {
    kind.name: kind for kind in (CuCIMBackend, OpenSlideBackend, TiffFileBackend, FrameBackend)
}
"""In the order in which ``backend="auto"`` tries them."""


LEVEL_TOLERANCE = 0.02
"""A level up to 2 % coarser than asked for is good enough to read from: four times fewer pixels than the next one."""

_MAX_SOURCE_PIXELS = 1 << 24
"""Source pixels that one read may decode at once; larger regions are read in parts, so memory stays bounded."""

_GLASS_THUMBNAIL = 512
_WHITE = np.full(3, 255, np.uint8)
_abandoned: list[Backend] = []
"""Handles inherited through fork: neither used nor closed here, the parent process still reads from them."""


class Slide:
    """An open slide. Made by `open_slide`; a context manager; picklable (the other process reopens the file).

    Coordinates are level-0 pixels, (x, y) of the top-left corner. Images are uint8 RGB, channel first.

    Attributes:
        path: the file.
        backend: name of the library that reads it.
        width: pixels of level 0.
        height: pixels of level 0.
        mpp: micrometres per pixel of level 0.
        mpp_source: ``"file"``, or ``"argument"`` where the caller gave it (the `mpp` column of a slide table).
        level_dimensions: (width, height) of each level.
        level_downsamples: level-0 pixels per pixel of each level.
        device: where `read_region` and `read_regions` leave the pixels.
    """

    def __init__(
        self,
        path: Path,
        handle: Backend,
        mpp: float,
        mpp_source: str,
        device: str = "cpu",
        file: Path | None = None,
    ) -> None:
        self.path = path
        self._file = path if file is None else file
        self.backend = handle.name
        self.mpp = mpp
        self.mpp_source = mpp_source
        self.device = device
        self.level_dimensions = list(handle.level_dimensions)
        self.level_downsamples = level_downsamples(self.level_dimensions)
        self.width, self.height = self.level_dimensions[0]
        self._glass: np.ndarray | None = None
        self._handle: Backend | None = handle
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()

    # -- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Reading afterwards raises SlideError; closing twice is fine."""
        handle, self._handle, self._closed = self._handle, None, True
        if handle is None:
            return
        if self._pid == os.getpid():
            handle.close()
        else:
            _abandoned.append(handle)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_handle"] = state["_lock"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return (
            f"Slide({str(self.path)!r}, {self.width} x {self.height} px at {self.mpp:.4g} um/px ({self.mpp_source}), "
            f"{len(self.level_dimensions)} levels, {self.backend})"
        )

    def _open_handle(self) -> Backend:
        """The handle of this process: reopened after a fork, after unpickling."""
        if self._closed:
            raise SlideError(f"{self.path} was closed; open it again with open_slide.")
        if self._handle is not None and self._pid != os.getpid():
            _abandoned.append(self._handle)
            self._handle = None
        if self._handle is None:
            try:
                self._handle = BACKENDS[self.backend](self._file)
            except (BackendError, OSError) as error:
                raise SlideError(f"{self.path} could be read before and cannot be opened now: {error}.") from error
            self._pid = os.getpid()
        return self._handle

    # -- pixels -------------------------------------------------------------------------------------------------

    @property
    def glass(self) -> np.ndarray:
        """The slide's own glass colour, (3,) uint8: the brightest common colour of its thumbnail. Estimated once."""
        if self._glass is None:
            self._glass = _WHITE
            try:
                self._glass = glass_colour(self.thumbnail(_GLASS_THUMBNAIL))
            except BaseException:
                self._glass = None
                raise
        return self._glass

    def best_level(self, mpp: float | None) -> int:
        """The coarsest level that is still fine enough to be averaged down to ``mpp`` (None: level 0)."""
        scale = 1.0 if mpp is None else mpp / self.mpp
        fine = [i for i, d in enumerate(self.level_downsamples) if d <= scale * (1 + LEVEL_TOLERANCE)]
        return max(fine, key=lambda i: self.level_downsamples[i]) if fine else 0

    def read_region(self, x: int, y: int, size: int | tuple[int, int], mpp: float | None = None) -> Any:
        """Read one region.

        Args:
            x: column of the top-left corner, level-0 pixels. May lie outside; glass colour is filled in.
            y: row of the top-left corner, level-0 pixels.
            size: pixels at ``mpp``: side, or (width, height).
            mpp: micrometres per pixel of the result; None for the slide's own.

        Returns:
            (3, height, width) uint8 array; a tensor on ``device`` when that is a CUDA device.

        Raises:
            SlideError: when the file cannot be decoded there.
            ValueError: for a size below 1 or a resolution that is not positive.
        """
        return self.read_regions(np.array([[x, y]], np.int64), size, mpp)[0]

    def read_regions(
        self,
        locations: np.ndarray | Sequence[tuple[int, int]],
        size: int | tuple[int, int],
        mpp: float | None = None,
        num_workers: int = 0,
    ) -> Any:
        """Read many equally large regions in one call: with cuCIM many times faster than one by one.

        Args:
            locations: (N, 2) top-left corners (x, y), level-0 pixels.
            size: pixels at ``mpp``: side, or (width, height).
            mpp: micrometres per pixel of the result; None for the slide's own. The level to read from is the
                coarsest that is fine enough; the rest is area averaging over exact source rectangles.
            num_workers: decoding threads (cuCIM); 0 decodes in one.

        Returns:
            (N, 3, height, width) uint8 array; a tensor on ``device`` when that is a CUDA device.

        Raises:
            SlideError: when the file cannot be decoded there.
            ValueError: for malformed locations, a size below 1 or a resolution that is not positive.
        """
        width, height = (size, size) if isinstance(size, (int, np.integer)) else size
        places = np.asarray(locations)
        if places.size == 0:
            places = places.reshape(0, 2)
        if places.ndim != 2 or places.shape[1] != 2:
            raise ValueError(f"locations must be (N, 2), x and y in level-0 pixels, but have shape {places.shape}")
        if width < 1 or height < 1:
            raise ValueError(f"size must be at least 1 pixel, but is {(width, height)}")
        if mpp is not None and not (np.isfinite(mpp) and mpp > 0):
            raise ValueError(f"mpp must be a positive number of micrometres per pixel, but is {mpp}")
        level = self.best_level(mpp)
        downsample = self.level_downsamples[level]
        scale = 1.0 if mpp is None else mpp / self.mpp / downsample
        starts = places.astype(np.float64) / downsample
        try:
            return self._read(level, starts, (int(width), int(height)), scale, num_workers)
        except BackendError as error:
            raise SlideError(
                f"{self.path} is damaged: {self.backend} cannot decode a region at level {level} ({error}); "
                "copy the file again from the scanner or leave it out."
            ) from error

    def thumbnail(self, max_size: int = 1024) -> np.ndarray:
        """The whole slide, longer side ``max_size`` pixels (never enlarged): (3, h, w) uint8, on the host."""
        shrink = max(1.0, max(self.width, self.height) / max_size)
        size = max(1, int(self.width / shrink)), max(1, int(self.height / shrink))
        device, self.device = self.device, "cpu"
        try:
            return self.read_region(0, 0, size, self.mpp * shrink)  # type: ignore[no-any-return]
        finally:
            self.device = device

    def _read(self, level: int, starts: np.ndarray, size: tuple[int, int], scale: float, num_workers: int) -> Any:
        """Regions of one level: ``starts`` (N, 2) float and ``scale`` in pixels of the level."""
        width, height = size
        exact = abs(scale - 1) * max(size) < 0.25
        source = size if exact else (window_size(width, scale), window_size(height, scale))
        area = source[0] * source[1]
        if area > _MAX_SOURCE_PIXELS and max(size) > 1:
            return self._read_in_parts(level, starts, size, scale, num_workers)
        group = max(1, _MAX_SOURCE_PIXELS // area)
        # At the level's own resolution a half-pixel shift is better than the blur of interpolating it away.
        corners = np.rint(starts).astype(np.int64) if exact else window_corners(starts)
        parts = [slice(i, i + group) for i in range(0, len(starts), group)]
        if self.device != "cpu":
            tensors = []
            for part in parts:
                windows = self._read_cuda(level, corners[part], source, num_workers)
                if windows is None:
                    break
                turned = windows.permute(0, 3, 1, 2).contiguous() if exact else None
                tensors.append(resample_cuda(windows, starts[part], size, scale) if turned is None else turned)
            else:
                if tensors:
                    return _concatenate(tensors, 0)
        images = np.empty((len(starts), 3, height, width), np.uint8)

        def convert(block: np.ndarray, places: slice) -> None:
            if exact:
                images[places] = block.transpose(0, 3, 1, 2)
            else:
                resample(block, starts[places], size, scale, images[places])

        for part in parts:
            self._read_blocks(level, corners[part], source, num_workers, part.start, convert)
        return self._finish(images)

    def _read_in_parts(
        self, level: int, starts: np.ndarray, size: tuple[int, int], scale: float, num_workers: int
    ) -> Any:
        """Halve the longer side until the parts are small enough: no level is ever decoded whole."""
        axis = 0 if size[0] >= size[1] else 1
        first = size[axis] // 2
        sizes = [list(size), list(size)]
        sizes[0][axis], sizes[1][axis] = first, size[axis] - first
        shift = np.zeros(2)
        shift[axis] = first * scale
        parts = [
            self._read(level, starts, (sizes[0][0], sizes[0][1]), scale, num_workers),
            self._read(level, starts + shift, (sizes[1][0], sizes[1][1]), scale, num_workers),
        ]
        return _concatenate(parts, 3 - axis)

    def _read_blocks(
        self,
        level: int,
        corners: np.ndarray,
        size: tuple[int, int],
        num_workers: int,
        start: int,
        convert: Callable[[np.ndarray, slice], None],
    ) -> None:
        """Call ``convert`` on windows of one level (k, h, w, 3), everything outside of the slide in glass colour.

        ``convert`` also gets where they belong, counted from ``start``. It copies: a block's memory is used again for
        the next one, while the processor still has it in its cache.
        """
        outside = self._outside(level, corners, size)
        fill = self._fill(outside)
        with self._lock:
            blocks = self._open_handle().read_blocks(level, corners, size, fill, num_workers)
        any_outside, done = bool(outside.any()), 0
        while done < len(corners):
            with self._lock:  # only to decode: what becomes of a block needs no lock
                block = next(blocks)
            part = slice(done, done + len(block))
            if any_outside and outside[part].any():
                block = block if block.flags.writeable and block.flags.owndata else block.copy()
                self._paint_outside(block, level, corners[part], outside[part], fill)
            convert(block, slice(start + part.start, start + part.stop))
            done = part.stop
            del block

    def _read_cuda(self, level: int, corners: np.ndarray, size: tuple[int, int], num_workers: int) -> Any:
        """The same as one CUDA tensor; None where the backend does not decode there."""
        outside = self._outside(level, corners, size)
        fill = self._fill(outside)
        with self._lock:
            windows = self._open_handle().read_cuda(level, corners, size, num_workers)
        if windows is not None:
            import torch

            colour = torch.from_numpy(np.array(fill)).to(windows.device)
            self._paint_outside(windows, level, corners, outside, colour)
        return windows

    def _outside(self, level: int, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        width, height = self.level_dimensions[level]
        outside: np.ndarray = (
            (corners < 0).any(1) | (corners[:, 0] + size[0] > width) | (corners[:, 1] + size[1] > height)
        )
        return outside

    def _fill(self, outside: np.ndarray) -> np.ndarray:
        return self._glass if self._glass is not None else (self.glass if outside.any() else _WHITE)

    def _paint_outside(self, windows: Any, level: int, corners: np.ndarray, outside: np.ndarray, colour: Any) -> None:
        width, height = self.level_dimensions[level]
        for i in np.flatnonzero(outside):
            x, y = (int(v) for v in corners[i])
            windows[i, : max(0, -y)] = colour
            windows[i, max(0, height - y) :] = colour
            windows[i, :, : max(0, -x)] = colour
            windows[i, :, max(0, width - x) :] = colour

    def _finish(self, images: np.ndarray) -> Any:
        if self.device == "cpu":
            return images
        import torch

        return torch.from_numpy(images).to(self.device, non_blocking=True)


def _concatenate(parts: list[Any], axis: int) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis)
    import torch

    return torch.cat(parts, axis)


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
