"""Frames (PNG, JPEG, BMP, plain TIFF, DICOM): images that are no whole slides come in as a slide of one level."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np

from cytossl_monai.data.slides.readers.base import Backend, BackendError, paste_inside
from cytossl_monai.data.slides.resolution import Resolution
from cytossl_monai.data.slides.tiff_tiles import TiffTiles, jpeg_complaint, read_tiff_tiles

__all__ = ["FrameBackend"]

_MAX_PIXELS = 1 << 28
"""Of an image that is read whole: 0.8 GB of RGB."""
_JPEG_START = b"\xff\xd8\xff"


class FrameBackend(Backend):
    """Read whole, once, through MONAI's ITKReader. The spacing that ITK finds (in mm) gives the resolution."""

    name: ClassVar[str] = "frame"
    suffixes: ClassVar[frozenset[str] | None] = frozenset(
        {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".dicom", ""}
    )

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        _refuse_by_header(path)
        _refuse_damaged_jpeg(path)
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
        except (RuntimeError, ValueError, OSError, TypeError, KeyError, MemoryError) as error:  # TypeError: ITK's own
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
        self.resolution = _resolution(path, np.asarray(meta.get("spacing", (0.0, 0.0)), dtype=float)[:2] * 1000)

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


def _refuse_by_header(path: Path) -> None:
    """Refuse what ITK would read as what it is not, or what no memory holds, before a pixel is read."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                (width, height), mode = image.size, image.mode
        except Image.DecompressionBombError as error:
            raise BackendError(f"too large to be read at once ({error}); convert it to pyramidal TIFF") from error
        except (OSError, ValueError, SyntaxError, TypeError, KeyError, OverflowError):
            return  # a format that Pillow does not know, DICOM among them: ITK judges
    if width * height > _MAX_PIXELS:
        raise BackendError(
            f"{width:,} x {height:,} pixels are too many to be read at once; convert it to pyramidal TIFF"
        )
    if mode in ("CMYK", "LAB", "F", "I", "I;16", "I;16B", "1"):
        raise BackendError(f"its pixels are of the kind {mode}; convert it to 8-bit RGB")


def _refuse_damaged_jpeg(path: Path) -> None:
    """ITK passes over libjpeg's warnings, and gives grey for what a JPEG file that ends too early lacks."""
    if not path.is_file():
        return  # a folder of DICOM files: ITK judges
    try:
        with open(path, "rb") as file:
            if file.read(len(_JPEG_START)) != _JPEG_START:
                return
            complaint = jpeg_complaint(_JPEG_START + file.read())
    except OSError as error:
        raise BackendError(_first_line(error)) from error
    if complaint is not None:
        raise BackendError(f"its JPEG image is cut short or damaged ({complaint}); copy it again")


def _resolution(path: Path, spacing: np.ndarray) -> Resolution:
    tiles = read_tiff_tiles(path) if path.suffix.lower() in (".tif", ".tiff") else None
    if isinstance(tiles, TiffTiles):
        return tiles.resolution
    # ITK says 1 mm where the file says nothing.
    if len(spacing) < 2 or np.allclose(spacing, 1000) or not np.isfinite(spacing).all() or (spacing <= 0).any():
        return Resolution()
    return Resolution(float(spacing[0]), float(spacing[1]))


def _first_line(error: Exception) -> str:
    """ITK's messages run over many lines; the one that says something is kept."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "rror" in line or "ould not" in line), lines[-1] if lines else "")
