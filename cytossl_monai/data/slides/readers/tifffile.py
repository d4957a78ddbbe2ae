"""tifffile: pure Python, reads compressions that the others lack. Only the tiles that a region touches are decoded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cytossl_monai.data.slides.readers.base import Backend, BackendError, paste_inside
from cytossl_monai.data.slides.resolution import Resolution
from cytossl_monai.data.slides.tiff_tiles import DAMAGED, read_tiff_tiles

__all__ = ["TiffFileBackend"]

_MAX_STRIP_PIXELS = 1 << 28


class TiffFileBackend(Backend):
    """Opens through MONAI's TiffFileWSIReader, whose region reading decodes the whole level; this one does not."""

    name: ClassVar[str] = "tifffile"
    suffixes: ClassVar[frozenset[str] | None] = frozenset(
        {".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif", ".btf", ".qptiff"}
    )

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
        if first.photometric == 6 and first.compression not in (6, 7, 33003, 33004, 33005, 34712):
            self.close()
            raise BackendError("its pixels are YCbCr, which tifffile leaves as they are")
        tiles = read_tiff_tiles(path)
        self.resolution = Resolution() if isinstance(tiles, str) else tiles.resolution

    leave_out_damaged = False
    """True: tiles that are not sound keep the colour of the glass, in place of an error."""

    def _segment(self, page: Any, index: int) -> np.ndarray | None:
        """Decode one tile or strip: (h, w, 3) uint8, or None where the file stores nothing there."""
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if self.leave_out_damaged and self._known_damaged(page, index):
            return None
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

    def _known_damaged(self, page: Any, index: int) -> bool:
        tiles = read_tiff_tiles(self.path)
        level = None if isinstance(tiles, str) else tiles.level_of((int(page.imagewidth), int(page.imagelength)))
        return not isinstance(tiles, str) and level is not None and tiles.levels[level].state[index] == DAMAGED

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
            try:
                pixels = self._segment(page, row * columns + column)
            except BackendError:
                if not self.leave_out_damaged:
                    raise
                pixels = None
            if pixels is None:
                continue
            for i in users:
                x, y = (int(v) for v in locations[i])
                paste_inside(out[i], pixels, (column * tile_w, row * tile_h), (x, y))
        return out

    def close(self) -> None:
        """Close the file."""
        self._file.close()
