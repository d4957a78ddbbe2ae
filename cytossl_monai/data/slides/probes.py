"""Is a file whole, and does a fast reader see in it what a careful one sees? Cheap checks, made once per file."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from cytossl_monai.data.slides.readers.base import Backend

__all__ = ["is_tiff", "probe", "probes_agree", "truncated_tiff"]

_TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_PROBE = 64
_MEAN_TOLERANCE = 6.0
"""Decoders differ by a grey level or two; garbage from a damaged tile differs by tens."""


def is_tiff(path: Path) -> bool:
    """Whether the first bytes are those of a TIFF or BigTIFF file."""
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        return stream.read(4) in _TIFF_MAGIC


def truncated_tiff(path: Path) -> str | None:
    """Say what is missing when a TIFF file ends before its own tables say it should; None when it is whole or no TIFF.

    cuCIM and tifffile open such a file and return black or garbage for what is not there.
    """
    import tifffile

    complaints: list[str] = []
    handler = logging.Handler(level=logging.WARNING)
    handler.emit = lambda record: complaints.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tifffile")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with tifffile.TiffFile(path) as tiff:
            size = tiff.filehandle.size
            pages = [page for series in tiff.series for level in series.levels for page in level.pages]
            need = max(
                (o + c for page in pages if page for o, c in zip(page.dataoffsets, page.databytecounts)), default=0
            )
            if need > size:
                return f"it ends after {size:,} bytes, its tile table points as far as {need:,}"
            if any("invalid" in line and "offset" in line for line in complaints):
                return f"it ends after {size:,} bytes, before one of its own directories"
    except (tifffile.TiffFileError, OSError, ValueError, IndexError, TypeError, KeyError):
        # Not a TIFF, or one that tifffile cannot follow: the backends judge by themselves.
        if any("invalid" in line and "offset" in line for line in complaints):
            return "it ends before its first directory"
        return None
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    return None


def probe(backend: Backend) -> list[np.ndarray]:
    """Decode small regions: the coarsest level's middle; the first corner, middle and last corner of level 0.

    Returns:
        arrays (n, h, w, 3) uint8 of regions that lie wholly within the slide.

    Raises:
        BackendError: when one cannot be decoded.
    """
    fill = np.full(3, 255, np.uint8)
    found = []
    for level in sorted({len(backend.level_dimensions) - 1, 0}):
        width, height = backend.level_dimensions[level]
        w, h = min(_PROBE, width), min(_PROBE, height)
        corners = np.array([(0, 0), ((width - w) // 2, (height - h) // 2), (width - w, height - h)], np.int64)
        found.append(backend.read(level, corners if level == 0 else corners[1:2], (w, h), fill))
    return found


def probes_agree(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    """Whether two backends decoded the level-0 probes to the same picture, up to decoder rounding."""
    a, b = first[0].astype(np.float32), second[0].astype(np.float32)
    if a.shape != b.shape:
        return False
    return bool(np.abs(a - b).mean(axis=(1, 2, 3)).max() <= _MEAN_TOLERANCE)
