"""OpenSlide: the reader of the vendors' own formats (MRXS, NDPI, SVS, SCN, BIF, DICOM)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from cytossl_monai.data.slides.readers.base import Backend, BackendError
from cytossl_monai.data.slides.resolution import Resolution, openslide_resolution
from cytossl_monai.data.slides.tiff_tiles import read_tiff_tiles

__all__ = ["OpenSlideBackend"]


class OpenSlideBackend(Backend):
    """Opens and reads the metadata through MONAI's OpenSlideWSIReader; pixels come with their alpha from OpenSlide."""

    name: ClassVar[str] = "openslide"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import openslide
            from monai.data.wsi_reader import OpenSlideWSIReader
        except (ImportError, OSError) as error:
            raise BackendError("OpenSlide is not installed (pip install openslide-python openslide-bin)") from error
        self._errors: tuple[type[Exception], ...] = (openslide.OpenSlideError, ValueError, OSError)
        try:
            self._slide = OpenSlideWSIReader().read(str(path))
            self.level_dimensions = [(int(w), int(h)) for w, h in self._slide.level_dimensions]
            self._downsamples = [float(d) for d in self._slide.level_downsamples]
        except self._errors as error:
            raise BackendError(str(error)) from error
        properties = self._slide.properties
        self.resolution = openslide_resolution(properties)
        if properties.get("openslide.vendor") in ("generic-tiff", "aperio"):
            # OpenSlide takes a tag without a unit for inches, and knows no OME-XML.
            tiles = read_tiff_tiles(path)
            self.resolution = Resolution() if isinstance(tiles, str) else tiles.resolution
        self.bounds_offset = tuple(int(properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy")

    def read(
        self, level: int, locations: np.ndarray, size: tuple[int, int], fill: np.ndarray, num_workers: int = 0
    ) -> np.ndarray:
        """See `Backend.read`. Pixels without data (alpha 0: outside, or never scanned) get ``fill``."""
        del num_workers
        width, height = size
        out = np.empty((len(locations), height, width, 3), np.uint8)
        # OpenSlide takes level-0 coordinates, divides by the downsample and interpolates at what is left of a pixel:
        # the nearest integer is off by 1 / (2 * downsample) of the level's pixels at most.
        scaled = np.rint(locations * self._downsamples[level]).astype(np.int64)
        for i, (x, y) in enumerate(scaled):
            try:
                rgba = np.asarray(self._slide.read_region((int(x), int(y)), level, size))
            except self._errors as error:
                raise BackendError(str(error)) from error
            out[i] = rgba[..., :3]
            alpha = rgba[..., 3]
            if alpha.min() < 255:
                weight = alpha[..., None].astype(np.float32) / 255
                out[i] = np.rint(rgba[..., :3] * weight + fill * (1 - weight)).astype(np.uint8)
        return out

    def close(self) -> None:
        """Close the slide."""
        self._slide.close()
