"""Whole slides, by whatever library can really decode the file: regions at any resolution, in batches, picklable."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from cytossl_monai.data.slides.decode import (
    glass_colour,
    spread,
)
from cytossl_monai.data.slides.readers.base import Backend, BackendError, level_downsamples
from cytossl_monai.data.slides.readers.cucim import CuCIMBackend
from cytossl_monai.data.slides.readers.frame import FrameBackend
from cytossl_monai.data.slides.readers.openslide import OpenSlideBackend
from cytossl_monai.data.slides.readers.tifffile import TiffFileBackend
from cytossl_monai.data.slides.reading import LevelReading
from cytossl_monai.data.slides.tiff_tiles import TiffTiles, read_tiff_tiles
from cytossl_monai.utils.errors import SlideError

__all__ = ["BACKENDS", "LEVEL_TOLERANCE", "Slide", "SlideError"]

BACKENDS: dict[str, type[Backend]] = {
    kind.name: kind for kind in (CuCIMBackend, OpenSlideBackend, TiffFileBackend, FrameBackend)
}
"""In the order in which ``backend="auto"`` tries them."""

LEVEL_TOLERANCE = 0.02
"""A level up to 2 % coarser than asked for is good enough to read from: four times fewer pixels than the next one."""

_GLASS_THUMBNAIL = 512
_SOUND_BATCH = 64
_WHITE = np.full(3, 255, np.uint8)
_abandoned: list[Backend] = []
"""Handles inherited through fork: neither used nor closed here, the parent process still reads from them."""


class Slide(LevelReading):
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
        bounds_offset: x, y of the scanned part within level 0, to which QuPath crops the slide (MRXS); else 0, 0.
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
        self.bounds_offset = (int(handle.bounds_offset[0]), int(handle.bounds_offset[1]))
        self._tiles: TiffTiles | None = None
        self._find_tiles()

    def _find_tiles(self) -> None:
        tiles = read_tiff_tiles(self._file) if self._file.is_file() and self.backend != "frame" else None
        self._tiles = tiles if isinstance(tiles, TiffTiles) and tiles.levels else None

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
        state["_handle"] = state["_lock"] = state["_tiles"] = None
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
            self._handle = self._new_handle()
            self._find_tiles()
            self._pid = os.getpid()
        return self._handle

    def _new_handle(self) -> Backend:
        try:
            return BACKENDS[self.backend](self._file)
        except (BackendError, OSError) as error:
            raise SlideError(f"{self.path} could be read before and cannot be opened now: {error}.") from error

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
        damaged: Literal["raise", "glass"] = "raise",
    ) -> Any:
        """Read many equally large regions in one call: with cuCIM many times faster than one by one.

        Args:
            locations: (N, 2) top-left corners (x, y), level-0 pixels.
            size: pixels at ``mpp``: side, or (width, height).
            mpp: micrometres per pixel of the result; None for the slide's own. The level to read from is the
                coarsest that is fine enough; the rest is area averaging over exact source rectangles.
            num_workers: decoding threads (cuCIM); 0 decodes in one.
            damaged: ``"glass"`` gives tiles of the file that cannot be decoded the colour of glass, for overviews.

        Returns:
            (N, 3, height, width) uint8 array; a tensor on ``device`` when that is a CUDA device.

        Raises:
            SlideError: when the file cannot be decoded there, and ``damaged`` is ``"raise"``.
            ValueError: for malformed locations, a size below 1 or a resolution that is not positive.
        """
        level, starts, pixels, scale = self._located(locations, size, mpp)
        try:
            return self._read(level, starts, pixels, scale, num_workers, damaged == "glass")
        except BackendError as error:
            raise SlideError(
                f"{self.path} is damaged: {self.backend} cannot decode a region at level {level} ({error}); "
                "copy the file again from the scanner or leave it out."
            ) from error

    def read_sound(
        self,
        locations: np.ndarray | Sequence[tuple[int, int]],
        size: int | tuple[int, int],
        mpp: float | None = None,
        num_workers: int = 0,
    ) -> tuple[Any, np.ndarray]:
        """Read the regions that can be decoded without a complaint of the decoder; see `read_regions`.

        Every tile of the file is decoded a second time by a decoder that tells of damage, which cuCIM and OpenSlide
        pass over (JPEG with libjpeg's warnings, at an eighth of the size).

        Returns:
            (N, 3, height, width) pixels, in the colour of glass where a region is not sound; and (N,) bool, which are.
        """
        level, starts, pixels, scale = self._located(locations, size, mpp)
        sound = self._sound(level, starts, pixels, scale, num_workers)
        if sound is None:
            try:
                return self.read_regions(locations, size, mpp, num_workers), np.ones(len(starts), bool)
            except SlideError:
                sound = np.ones(len(starts), bool)
            for i, start in enumerate(starts):
                try:
                    self._read(level, start[None], pixels, scale, 0)
                except BackendError:
                    sound[i] = False
        images = self.read_regions(np.asarray(locations)[sound], size, mpp, num_workers)
        if sound.all():
            return images, sound
        return spread(images, sound, self.glass), sound

    def sound(
        self,
        locations: np.ndarray | Sequence[tuple[int, int]],
        size: int | tuple[int, int],
        mpp: float | None = None,
        num_workers: int = 0,
    ) -> np.ndarray:
        """Which regions can be decoded without a complaint of the decoder, (N,) bool; see `read_sound`."""
        level, starts, pixels, scale = self._located(locations, size, mpp)
        found = self._sound(level, starts, pixels, scale, num_workers)
        if found is not None:
            return found
        places = np.asarray(locations).reshape(-1, 2)
        cuts = range(0, len(places), _SOUND_BATCH)
        parts = [self.read_sound(places[i : i + _SOUND_BATCH], size, mpp, num_workers)[1] for i in cuts]
        return np.concatenate([np.zeros(0, bool), *parts])

    def _located(
        self, locations: np.ndarray | Sequence[tuple[int, int]], size: int | tuple[int, int], mpp: float | None
    ) -> tuple[int, np.ndarray, tuple[int, int], float]:
        """The level to read from; in its pixels the corners (N, 2) float and the pixels per pixel; (width, height)."""
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
        return level, places.astype(np.float64) / downsample, (int(width), int(height)), scale

    def thumbnail(self, max_size: int = 1024) -> np.ndarray:
        """The whole slide, longer side ``max_size`` pixels (never enlarged): (3, h, w) uint8, on the host."""
        shrink = max(1.0, max(self.width, self.height) / max_size)
        size = max(1, int(self.width / shrink)), max(1, int(self.height / shrink))
        device, self.device = self.device, "cpu"
        try:
            pixels = self.read_regions(np.zeros((1, 2), np.int64), size, self.mpp * shrink, damaged="glass")
            return pixels[0]  # type: ignore[no-any-return]
        finally:
            self.device = device
