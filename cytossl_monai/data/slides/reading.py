"""Reading the pixels of one level of a slide: in parts that fit in memory, around its border and around damage."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from cytossl_monai.data.slides.decode import concatenate, decode_around_damage, source_windows
from cytossl_monai.data.slides.readers.base import Backend, BackendError
from cytossl_monai.data.slides.resample import resample, resample_cuda
from cytossl_monai.data.slides.tiff_tiles import TiffTiles

__all__ = ["LevelReading"]

_MAX_SOURCE_PIXELS = 1 << 24
"""Source pixels that one read may decode at once; larger regions are read in parts, so memory stays bounded."""

_WHITE = np.full(3, 255, np.uint8)


class LevelReading(ABC):
    """The part of `Slide` that works in pixels of one level."""

    device: str
    level_dimensions: list[tuple[int, int]]
    _glass: np.ndarray | None
    _handle: Backend | None
    _lock: threading.Lock
    _tiles: TiffTiles | None

    @property
    @abstractmethod
    def glass(self) -> np.ndarray:
        """The colour of clear glass, (3,) uint8."""

    @abstractmethod
    def _open_handle(self) -> Backend:
        """The handle of this process."""

    @abstractmethod
    def _new_handle(self) -> Backend:
        """A handle without a past."""

    def _sound(
        self, level: int, starts: np.ndarray, size: tuple[int, int], scale: float, num_workers: int
    ) -> np.ndarray | None:
        """Which regions are sound by the file's tile tables, (N,) bool; None where it has none."""
        with self._lock:
            self._open_handle()
        corners, source, _ = source_windows(starts, size, scale)
        number = None if self._tiles is None else self._tiles.level_of(self.level_dimensions[level])
        if self._tiles is None or number is None:
            return None
        return ~self._tiles.damaged(number, corners, source, decode=True, num_threads=max(1, num_workers))

    def _read(
        self, level: int, starts: np.ndarray, size: tuple[int, int], scale: float, num_workers: int, glass: bool = False
    ) -> Any:
        """Regions of one level: ``starts`` (N, 2) float and ``scale`` in pixels of the level."""
        width, height = size
        corners, source, exact = source_windows(starts, size, scale)
        area = source[0] * source[1]
        if area > _MAX_SOURCE_PIXELS and max(size) > 1:
            return self._read_in_parts(level, starts, size, scale, num_workers, glass)
        group = max(1, _MAX_SOURCE_PIXELS // area)
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
                    return concatenate(tensors, 0)
        images = np.empty((len(starts), 3, height, width), np.uint8)

        def convert(block: np.ndarray, places: slice) -> None:
            if exact:
                images[places] = block.transpose(0, 3, 1, 2)
            else:
                resample(block, starts[places], size, scale, images[places])

        for part in parts:
            self._read_blocks(level, corners[part], source, num_workers, part.start, convert, glass)
        return self._finish(images)

    def _read_in_parts(
        self, level: int, starts: np.ndarray, size: tuple[int, int], scale: float, num_workers: int, glass: bool
    ) -> Any:
        """Halve the longer side until the parts are small enough: no level is ever decoded whole."""
        axis = 0 if size[0] >= size[1] else 1
        first, second, shift = list(size), list(size), np.zeros(2)
        first[axis] = size[axis] // 2
        second[axis] -= first[axis]
        shift[axis] = first[axis] * scale
        parts = [
            self._read(level, starts, (first[0], first[1]), scale, num_workers, glass),
            self._read(level, starts + shift, (second[0], second[1]), scale, num_workers, glass),
        ]
        return concatenate(parts, 3 - axis)

    def _read_blocks(
        self,
        level: int,
        corners: np.ndarray,
        size: tuple[int, int],
        num_workers: int,
        start: int,
        convert: Callable[[np.ndarray, slice], None],
        glass: bool,
    ) -> None:
        """Call ``convert`` on windows of one level (k, h, w, 3), everything outside of the slide in glass colour.

        ``convert`` also gets where they belong, counted from ``start``. It copies: a block's memory is used again for
        the next one, while the processor still has it in its cache.
        """
        outside = self._outside(level, corners, size)
        fill = self._fill(outside)
        with self._lock:
            handle = self._open_handle()
            if self._framed(level, corners, size, glass):
                blocks = handle.read_blocks(level, corners, size, fill, num_workers)
            else:
                blocks = iter([self._around_damage(level, corners, size, fill)])
        any_outside, done = bool(outside.any()), 0
        while done < len(corners):
            with self._lock:  # only to decode: what becomes of a block needs no lock
                try:
                    block = next(blocks)
                except BackendError:
                    handle.close()  # OpenSlide reads nothing more after an error
                    self._handle = None
                    if not glass:
                        raise
                    block = self._around_damage(level, corners[done:], size, fill)
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
            handle = self._open_handle()
            framed = self._framed(level, corners, size, True)
            windows = handle.read_cuda(level, corners, size, num_workers) if framed else None
        if windows is not None:
            import torch

            colour = torch.from_numpy(np.array(fill)).to(windows.device)
            self._paint_outside(windows, level, corners, outside, colour)
        return windows

    def _framed(self, level: int, corners: np.ndarray, size: tuple[int, int], glass: bool) -> bool:
        """Whether the frames of all tiles that the windows touch fit; else an error, or False with ``glass``."""
        number = None if self._tiles is None else self._tiles.level_of(self.level_dimensions[level])
        if self._tiles is None or number is None or not self._tiles.damaged(number, corners, size).any():
            return True
        if not glass:
            raise BackendError(self._tiles.why(number))
        return False

    def _around_damage(self, level: int, corners: np.ndarray, size: tuple[int, int], fill: np.ndarray) -> np.ndarray:
        return decode_around_damage(self._new_handle, level, self.level_dimensions, corners, size, fill)

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
