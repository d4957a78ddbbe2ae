"""tifffile: pure Python, reads compressions that the others lack. Only the tiles that a region touches are decoded."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cytossl_monai.data.slides.readers.base import Backend, BackendError, paste_inside

__all__ = ["TiffFileBackend", "tiff_mpp"]

_MAX_STRIP_PIXELS = 1 << 28
_UNIT_UM = {2: 25_400.0, 3: 10_000.0, 4: 1_000.0, 5: 1.0}


def tiff_mpp(page: Any) -> float | None:
    """Micrometres per pixel that a TIFF page states: Aperio's MPP, OME's PhysicalSizeX, or the resolution tags.

    Args:
        page: a tifffile ``TiffPage``, the one of full resolution.

    Returns:
        the number as stated (the caller judges whether it is absurd), or None.
    """
    description = page.description or ""
    aperio = re.search(r"\bMPP\s*=\s*([0-9.]+)", description)
    if aperio:
        return float(aperio.group(1))
    size = re.search(r'PhysicalSizeX="([0-9.eE+-]+)"', description)
    if size:
        unit = re.search(r'PhysicalSizeXUnit="([^"]+)"', description)
        factor = {"nm": 1e-3, "mm": 1e3, "cm": 1e4}.get(unit.group(1) if unit else "um", 1.0)
        return float(size.group(1)) * factor
    tags = page.tags
    unit_tag = tags.get("ResolutionUnit")
    if unit_tag is None or int(unit_tag.value) not in _UNIT_UM:
        return None
    values = []
    for name in ("XResolution", "YResolution"):
        tag = tags.get(name)
        if tag is None:
            return None
        numerator, denominator = tag.value if isinstance(tag.value, tuple) else (tag.value, 1)
        if not numerator or not denominator:
            return None
        values.append(_UNIT_UM[int(unit_tag.value)] * denominator / numerator)
    return math.sqrt(values[0] * values[1])


class TiffFileBackend(Backend):
    """Opens through MONAI's TiffFileWSIReader, whose region reading decodes the whole level; this one does not."""

    name: ClassVar[str] = "tifffile"
    suffixes: ClassVar[frozenset[str] | None] = frozenset({".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif", ".btf"})

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import tifffile
        from monai.data.wsi_reader import TiffFileWSIReader

        try:
            self._file = TiffFileWSIReader().read(str(path))
        except (tifffile.TiffFileError, OSError, ValueError) as error:
            raise BackendError(str(error)) from error
        try:
            series = max(self._file.series, key=lambda one: math.prod(one.shape))
            self._pages = [level.pages[0] for level in series.levels]
        except (tifffile.TiffFileError, ValueError, IndexError, AttributeError) as error:
            self.close()
            raise BackendError(str(error)) from error
        first = self._pages[0]
        if first.dtype != np.uint8 or first.samplesperpixel not in (3, 4) or first.planarconfig != 1:
            self.close()
            raise BackendError(f"not an 8-bit RGB image (shape {first.shape}, {first.dtype})")
        if not first.is_tiled and first.imagewidth * first.rowsperstrip > _MAX_STRIP_PIXELS:
            self.close()
            raise BackendError("stored as one strip, too large to read in parts")
        self.level_dimensions = [(int(page.imagewidth), int(page.imagelength)) for page in self._pages]
        self.file_mpp = tiff_mpp(first)

    def _segment(self, page: Any, index: int) -> np.ndarray | None:
        """Decode one tile or strip: (h, w, 3) uint8, or None where the file stores nothing there."""
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if count == 0:
            return None
        handle = self._file.filehandle
        handle.seek(offset)
        data = handle.read(count)
        if len(data) != count:
            raise BackendError(f"the file ends within tile {index}")
        try:
            decoded, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
        except Exception as error:  # every codec has an error class of its own
            raise BackendError(f"tile {index} cannot be decoded: {error}") from error
        if decoded is None:
            return None
        pixels: np.ndarray = decoded.reshape(decoded.shape[-3:])[: shape[1], : shape[2], :3]
        return pixels

    def read(
        self, level: int, locations: np.ndarray, size: tuple[int, int], fill: np.ndarray, num_workers: int = 0
    ) -> np.ndarray:
        """See `Backend.read`. Tiles that neighbouring regions of one call share are decoded once."""
        del num_workers
        page = self._pages[level]
        width, height = size
        tile_w = page.tilewidth if page.is_tiled else page.imagewidth
        tile_h = page.tilelength if page.is_tiled else page.rowsperstrip
        columns = math.ceil(page.imagewidth / tile_w)
        rows = math.ceil(page.imagelength / tile_h)
        out = np.empty((len(locations), height, width, 3), np.uint8)
        out[:] = fill
        wanted: dict[tuple[int, int], list[int]] = {}
        for i, (x, y) in enumerate(locations):
            for row in range(max(0, int(y) // tile_h), min(rows, -(-int(y + height) // tile_h))):
                for column in range(max(0, int(x) // tile_w), min(columns, -(-int(x + width) // tile_w))):
                    wanted.setdefault((row, column), []).append(i)
        for (row, column), users in wanted.items():
            pixels = self._segment(page, row * columns + column)
            if pixels is None:
                continue
            for i in users:
                x, y = (int(v) for v in locations[i])
                paste_inside(out[i], pixels, (column * tile_w, row * tile_h), (x, y))
        return out

    def close(self) -> None:
        """Close the file."""
        self._file.close()
