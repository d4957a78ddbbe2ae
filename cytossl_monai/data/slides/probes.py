"""Is a file whole, and does a fast reader see in it what a careful one sees? Cheap checks, made once per file."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from cytossl_monai.data.slides.readers.base import Backend, BackendError
from cytossl_monai.data.slides.tiff_tiles import TiffTiles

__all__ = ["is_tiff", "probe", "probe_places", "probes_agree", "truncated_tiff"]

_TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_PROBE = 64
_SHARES = (
    (0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.25, 0.5), (0.75, 0.5), (0.5, 0.25), (0.5, 0.75), (0.3, 0.3), (0.7, 0.7),
    (0.3, 0.7), (0.7, 0.3), (0.4, 0.6), (0.6, 0.4), (1.0, 0.0), (0.0, 1.0), (0.1, 0.5), (0.9, 0.5),
)  # fmt: skip
"""Places to look at, as shares of width and height; the first three that are sound are."""

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


def probe_places(dimensions: list[tuple[int, int]], tiles: TiffTiles | None = None) -> list[np.ndarray]:
    """Where to decode: the first corner, the middle and the last corner of level 0, the middle of the coarsest level.

    A place whose tiles are damaged is passed over for another: one damaged tile does not make a slide unreadable.

    Args:
        dimensions: (width, height) of each level.
        tiles: the file's tile tables, where it has any.

    Returns:
        (n, 2) int64 corners (x, y) of level 0, n up to 3, and (1, 2) of the coarsest level where there are more.

    Raises:
        BackendError: when not one place of level 0 is sound.
    """
    places = []
    for level in sorted({len(dimensions) - 1, 0}):
        width, height = dimensions[level]
        w, h = min(_PROBE, width), min(_PROBE, height)
        shares = _SHARES if level == 0 else (_SHARES[1], _SHARES[0], *_SHARES[2:])
        corners = np.array([(int((width - w) * x), int((height - h) * y)) for x, y in shares], np.int64)
        number = tiles.level_of((width, height)) if tiles is not None else None
        if tiles is not None and number is not None:
            corners = _sound(tiles, number, corners, (w, h), 3 if level == 0 else 1)
            if not len(corners) and level == 0:
                raise BackendError(f"not one of {len(_SHARES)} places can be decoded ({tiles.why(number)})")
        places.append(corners[:3] if level == 0 else corners[:1])
    return places


def _sound(tiles: TiffTiles, number: int, corners: np.ndarray, size: tuple[int, int], enough: int) -> np.ndarray:
    """The first corners whose tiles decode without a complaint."""
    found: list[np.ndarray] = []
    for corner in corners:
        if not tiles.damaged(number, corner[None], size, decode=True)[0]:
            found.append(corner)
        if len(found) == enough:
            break
    return np.array(found, np.int64).reshape(-1, 2)


def probe(backend: Backend, places: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """Decode small regions, see `probe_places`.

    Args:
        backend: an open file.
        places: where; None for the usual ones.

    Returns:
        arrays (n, h, w, 3) uint8 of regions that lie wholly within the slide.

    Raises:
        BackendError: when one cannot be decoded.
    """
    fill = np.full(3, 255, np.uint8)
    dimensions = backend.level_dimensions
    found = []
    for level, corners in zip(sorted({len(dimensions) - 1, 0}), places or probe_places(dimensions)):
        width, height = dimensions[level]
        found.append(backend.read(level, corners, (min(_PROBE, width), min(_PROBE, height)), fill))
    return found


def probes_agree(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    """Whether two backends decoded the level-0 probes to the same picture, up to decoder rounding."""
    a, b = first[0].astype(np.float32), second[0].astype(np.float32)
    if a.shape != b.shape:
        return False
    return bool(np.abs(a - b).mean(axis=(1, 2, 3)).max() <= _MEAN_TOLERANCE)
