"""OpenSlide: the reader of the vendors' own formats (MRXS, NDPI, SVS, SCN, BIF, DICOM)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np

from cytossl_monai.data.slides.readers.base import Backend, BackendError

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
            reader = OpenSlideWSIReader()
            self._slide = reader.read(str(path))
            self.level_dimensions = [(int(w), int(h)) for w, h in self._slide.level_dimensions]
            self._downsamples = [float(d) for d in self._slide.level_downsamples]
        except self._errors as error:
            raise BackendError(str(error)) from error
        self.file_mpp = None
        # A resolution without a unit means nothing, though MONAI would take it for pixels per micrometre.
        properties = self._slide.properties
        if "openslide.mpp-x" in properties or properties.get("tiff.ResolutionUnit") in ("inch", "centimeter"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    self.file_mpp = float(np.sqrt(np.prod(reader.get_mpp(self._slide, 0))))
                except (ValueError, ZeroDivisionError):
                    self.file_mpp = None

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
