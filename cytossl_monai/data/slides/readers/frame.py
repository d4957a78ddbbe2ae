"""Frames (PNG, JPEG, BMP, plain TIFF, DICOM): images that are no whole slides come in as a slide of one level."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from cytossl_monai.data.slides.readers.base import Backend, BackendError, paste_inside

__all__ = ["FrameBackend"]


class FrameBackend(Backend):
    """Read whole, once, through MONAI's ITKReader. The spacing that ITK finds (in mm) gives the resolution."""

    name: ClassVar[str] = "frame"
    suffixes: ClassVar[frozenset[str] | None] = frozenset(
        {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".dicom", ""}
    )

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            from monai.data import ITKReader

            reader = ITKReader(reverse_indexing=True)
            image = reader.read(str(path))
            array, meta = reader.get_data(image)
            # get_data returns a view of memory that ITK frees with the image.
            array = np.array(array, copy=True)
            del image
        except ImportError as error:
            raise BackendError("ITK is not installed (pip install itk-io)") from error
        except (RuntimeError, ValueError, OSError) as error:
            raise BackendError(_first_line(error)) from error
        if array.dtype != np.uint8:
            raise BackendError(f"{array.dtype} pixels; convert it to 8-bit RGB")
        array = np.squeeze(array)
        if array.ndim == 2:
            array = np.repeat(array[..., None], 3, axis=-1)
        if array.ndim != 3 or array.shape[-1] not in (3, 4):
            raise BackendError(f"not a flat RGB or grey image (shape {array.shape})")
        self._pixels = np.ascontiguousarray(array[..., :3])
        self.level_dimensions = [(array.shape[1], array.shape[0])]
        spacing = np.asarray(meta.get("spacing", (0.0, 0.0)), dtype=float)[:2] * 1000
        # ITK says 1 mm where the file says nothing.
        self.file_mpp = None if np.allclose(spacing, 1000) or (spacing <= 0).any() else float(np.sqrt(spacing.prod()))

    def read(
        self, level: int, locations: np.ndarray, size: tuple[int, int], fill: np.ndarray, num_workers: int = 0
    ) -> np.ndarray:
        """See `Backend.read`."""
        del level, num_workers
        out = np.empty((len(locations), size[1], size[0], 3), np.uint8)
        out[:] = fill
        for region, (x, y) in zip(out, locations):
            paste_inside(region, self._pixels, (0, 0), (int(x), int(y)))
        return out

    def close(self) -> None:
        """Let go of the pixels."""
        self._pixels = np.empty((0, 0, 3), np.uint8)


def _first_line(error: Exception) -> str:
    """ITK's messages run over many lines; the one that says something is kept."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "rror" in line or "ould not" in line), lines[-1] if lines else "")
