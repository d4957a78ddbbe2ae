"""The tile tables of a TIFF slide: which of its tiles are sound, before a library that does not look decodes them."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cytossl_monai.data.slides.resolution import Resolution, tiff_resolution
from cytossl_monai.utils.errors import first_line

__all__ = ["DAMAGED", "Contradiction", "TiffTiles", "read_tiff_tiles"]

UNKNOWN, FRAMED, SOUND, DAMAGED = 0, 1, 2, 3
"""What is known of a tile: nothing; its header fits the file's tables; it was decoded without complaint; neither."""

_HEADER_BYTES = 2048
_MAX_TILE_PIXELS = 1 << 26
_JPEG = (7,)
_CUCIM = (1, 5, 7, 8, 32946, 33003, 33005)
"""Compressions that cuCIM decodes: none, LZW, JPEG, deflate (two numbers), Aperio's JPEG 2000 (two)."""

_PHOTOMETRIC = {0: "white-is-zero grey", 3: "palette", 4: "mask", 5: "CMYK", 8: "L*a*b*", 9: "L*a*b*", 10: "L*a*b*"}
_SAMPLE_FORMAT = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}


class Contradiction(str):
    """Why a TIFF file's tables cannot be true: no reader should be trusted with it."""


class _ContradictionError(ValueError):
    pass


@dataclass
class _Level:
    """The tiles (or strips) of one level, and what is known of each."""

    page: Any
    width: int
    height: int
    tile_w: int
    tile_h: int
    columns: int
    rows: int
    offsets: np.ndarray
    counts: np.ndarray
    compression: int
    samples: int
    tables: bytes | None
    state: np.ndarray
    n_damaged: int = 0
    reasons: dict[int, str] = field(default_factory=dict)

    def frame_size(self, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(width, height) of a whole tile, and of the part of this one that lies within the image."""
        row, column = divmod(number, self.columns)
        inside = min(self.tile_w, self.width - column * self.tile_w), min(self.tile_h, self.height - row * self.tile_h)
        return (self.tile_w, self.tile_h), inside


class TiffTiles:
    """What the tables of a TIFF file say, and which of its tiles can be decoded soundly.

    A tile is looked at when it is first needed: its JPEG header must fit the file's tables, since cuCIM writes beyond
    its buffer where a frame is larger than its tile; with ``decode`` the decoder must also have no complaint.

    Attributes:
        levels: full resolution first; empty where the tiles cannot be told apart (NDPI).
        resolution: as stated.
        refusal: why the pixels are not 8-bit RGB or grey, to follow the file's name; None where they are.
        cucim_refusal: why cuCIM must not decode it; None where it may.
    """

    def __init__(self, path: Path) -> None:
        """Read the tables.

        Raises:
            tifffile.TiffFileError, OSError, ValueError, IndexError, TypeError, KeyError: when they cannot be read.
        """
        import tifffile

        self.path = path
        with tifffile.TiffFile(path) as tiff:
            first = tiff.pages[0]
            if not first.imagewidth or not first.imagelength:
                raise _ContradictionError(f"its first image is {first.imagewidth} x {first.imagelength} pixels")
            series = max(tiff.series, key=lambda one: int(np.prod([int(n) for n in one.shape], dtype=object)))
            pages = [level.pages[0] for level in series.levels]
            self.resolution: Resolution = tiff_resolution(pages[0], tiff.ome_metadata if tiff.is_ome else None)
            self.refusal = _pixel_refusal(pages[0])
            self.levels = [] if tiff.is_ndpi or self.refusal else [_level(page) for page in pages]
        self.cucim_refusal = self._cucim_refusal(pages)

    def _cucim_refusal(self, pages: Sequence[Any]) -> str | None:
        if not self.levels:
            return "its tiles cannot be checked beforehand"
        for page in pages:
            if int(page.compression) not in _CUCIM:
                return f"cuCIM does not decode the compression {int(page.compression)}"
            if page.predictor not in (None, 1) and int(page.compression) != 5:
                return f"cuCIM crashes on the compression {int(page.compression)} with a predictor"
            if page.planarconfig != 1 or (int(page.photometric) == 6 and int(page.compression) in (1, 5, 8, 32946)):
                return "cuCIM takes its planes or its colour space for RGB"
        return None

    def level_of(self, dimensions: tuple[int, int]) -> int | None:
        """Number of the level of this (width, height), None where there is none."""
        return next((i for i, level in enumerate(self.levels) if (level.width, level.height) == dimensions), None)

    def damaged(
        self, number: int, corners: np.ndarray, size: tuple[int, int], decode: bool = False, num_threads: int = 1
    ) -> np.ndarray:
        """Which regions of a level touch a tile that is not sound.

        Args:
            number: the level.
            corners: (N, 2) int64, (x, y) of the regions, pixels of the level; they may lie outside.
            size: (width, height) of the regions.
            decode: decode the tiles too (JPEG at an eighth of the size: the same bits are read, a third of the time).
            num_threads: tiles at once.

        Returns:
            (N,) bool.
        """
        level = self.levels[number]
        grid = level.state.reshape(level.rows, level.columns)
        low = np.clip(corners // (level.tile_w, level.tile_h), 0, (level.columns, level.rows))
        last = (corners + size - 1) // (level.tile_w, level.tile_h) + 1
        high = np.maximum(np.clip(last, 0, (level.columns, level.rows)), low)
        spans = [(slice(y0, y1), slice(x0, x1)) for (x0, y0), (x1, y1) in zip(low.tolist(), high.tolist())]
        wanted = np.zeros(grid.shape, bool)
        for span in spans:
            wanted[span] = True
        numbers = np.flatnonzero(wanted.ravel() & (level.state < (SOUND if decode else FRAMED)))
        if len(numbers):
            self._check(level, numbers, decode, num_threads)
        if not level.n_damaged:
            return np.zeros(len(corners), bool)
        return np.array([bool((grid[span] == DAMAGED).any()) for span in spans], bool)

    def why(self, number: int) -> str:
        """One reason why tiles of a level are not sound."""
        return next(iter(self.levels[number].reasons.values()), "a tile cannot be decoded")

    def _check(self, level: _Level, numbers: np.ndarray, decode: bool, num_threads: int) -> None:
        handle = os.open(self.path, os.O_RDONLY)
        size = os.fstat(handle).st_size

        def one(tile: int) -> None:
            reason = None
            if level.state[tile] == UNKNOWN:
                reason = _frame_complaint(level, tile, handle, size)
            if reason is None and decode:
                reason = _decoder_complaint(level, tile, handle)
            if reason is None:
                level.state[tile] = SOUND if decode else FRAMED
            else:
                level.reasons.setdefault(tile, f"tile {tile}: {reason}")
                level.state[tile] = DAMAGED

        try:
            # In the order of the file: a disk is read forward.
            order = numbers[np.argsort(level.offsets[numbers], kind="stable")].tolist()
            if decode and num_threads > 1 and len(order) > 8:
                with ThreadPoolExecutor(num_threads) as pool:
                    list(pool.map(one, order, chunksize=8))
            else:
                for tile in order:
                    one(tile)
        finally:
            os.close(handle)
        level.n_damaged = int((level.state == DAMAGED).sum())


def _level(page: Any) -> _Level:
    """The tables of one page.

    Raises:
        _ContradictionError: when they contradict the size that the page states.
    """
    width, height = int(page.imagewidth), int(page.imagelength)
    tile_w = int(page.tilewidth) if page.is_tiled else width
    tile_h = int(page.tilelength) if page.is_tiled else min(height, int(page.rowsperstrip))
    if min(width, height, tile_w, tile_h) < 1:
        raise _ContradictionError(f"a level of {width} x {height} pixels in tiles of {tile_w} x {tile_h}")
    columns, rows = -(-width // tile_w), -(-height // tile_h)
    planes = 1 if page.planarconfig == 1 else int(page.samplesperpixel)
    offsets, counts = (np.asarray(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
    if not len(offsets) == len(counts) == columns * rows * planes:
        raise _ContradictionError(
            f"a level of {width:,} x {height:,} pixels needs {columns * rows * planes:,} tiles, its table lists "
            f"{len(offsets):,}"
        )
    if page.is_tiled and tile_w * tile_h > _MAX_TILE_PIXELS:
        raise _ContradictionError(f"tiles of {tile_w:,} x {tile_h:,} pixels are too large to read in parts")
    return _Level(
        page=page,
        width=width,
        height=height,
        tile_w=tile_w,
        tile_h=tile_h,
        columns=columns,
        rows=rows,
        offsets=offsets,
        counts=counts,
        compression=int(page.compression),
        samples=int(page.samplesperpixel),
        tables=page.jpegtables,
        state=np.full(columns * rows, UNKNOWN if planes == 1 else SOUND, np.uint8),
    )


def _pixel_refusal(page: Any) -> str | None:
    """Why pixels would be read as what they are not, by the tags: cuCIM and libtiff take some of these for RGB."""
    bits = page.bitspersample
    kind = int(page.photometric)
    samples = int(page.samplesperpixel)
    form = int(page.sampleformat)
    fault = None
    if form in _SAMPLE_FORMAT:
        fault = f"{_SAMPLE_FORMAT[form]} pixels"
    elif (bits if isinstance(bits, int) else max(bits)) != 8:
        fault = f"{bits if isinstance(bits, int) else max(bits)} bits a channel"
    elif kind in _PHOTOMETRIC:
        fault = f"{_PHOTOMETRIC[kind]} pixels"
    elif samples not in (1, 3, 4):
        fault = f"{samples} channels"
    return None if fault is None else f"has {fault}; convert it to 8-bit RGB"


def _frame_complaint(level: _Level, tile: int, handle: int, file_size: int) -> str | None:
    """What is wrong with a tile's place in the file or its JPEG header; None where nothing is."""
    offset, count = int(level.offsets[tile]), int(level.counts[tile])
    if count == 0:
        return None  # nothing was scanned there
    if offset + count > file_size:
        return "it lies beyond the end of the file"
    if level.compression == 1:
        (width, height), (_, inside) = level.frame_size(tile)
        rows = height if level.page.is_tiled else inside
        return None if count >= width * rows * level.samples else "it holds less than its pixels"
    if level.compression not in _JPEG:
        return None
    frame = jpeg_frame(os.pread(handle, min(count, _HEADER_BYTES), offset))
    if frame is None and count > _HEADER_BYTES:
        frame = jpeg_frame(os.pread(handle, count, offset))
    if frame is None:
        return "it is no JPEG image"
    width, height, components, precision = frame
    whole, inside_tile = level.frame_size(tile)
    if (width, height) not in (whole, inside_tile, (whole[0], inside_tile[1]), (inside_tile[0], whole[1])):
        return f"its JPEG frame is {width} x {height} pixels, the tile {whole[0]} x {whole[1]}"
    if components != level.samples or precision != 8:
        return f"its JPEG frame has {components} channels of {precision} bits, the file {level.samples} of 8"
    return None


def jpeg_frame(data: bytes) -> tuple[int, int, int, int] | None:
    """Width, height, components and bits of the frame in a JPEG stream; None where its markers lead to none."""
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == 0xFF:  # filling
            place += 1
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2):
            if place + 10 > len(data):
                return None
            height, width = (int.from_bytes(data[place + at : place + at + 2], "big") for at in (5, 7))
            return width, height, data[place + 9], data[place + 4]
        # A scan before any frame, or a frame of another kind (lossless, arithmetic), which no reader here decodes.
        if marker in (0xD9, 0xDA) or (0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or length < 2:
            return None
        place += 2 + length
    return None


def _decoder_complaint(level: _Level, tile: int, handle: int) -> str | None:
    """What a decoder says of a tile; libjpeg's warnings count, which every slide reader passes over."""
    offset, count = int(level.offsets[tile]), int(level.counts[tile])
    if count == 0:
        return None
    data = os.pread(handle, count, offset)
    try:
        if level.compression in _JPEG and level.samples in (1, 3):
            return jpeg_complaint(level.tables[:-2] + data[2:] if level.tables else data, level.samples)
        pixels, _, shape = level.page.decode(data, tile, jpegtables=level.tables)
        if pixels is not None and pixels.size < int(np.prod(shape)):
            return "it decodes to fewer pixels than it should"
    except Exception as error:  # noqa: BLE001 - every codec has an error class of its own
        return first_line(error)
    return None


def jpeg_complaint(data: bytes, components: int = 3) -> str | None:
    """What libjpeg says of a JPEG image, its warnings included; None where it is whole.

    Args:
        data: the image, with its tables.
        components: 1 where it is grey.
    """
    import simplejpeg

    try:  # at an eighth of the size, which reads every byte and takes a fraction of the time
        simplejpeg.decode_jpeg(data, "GRAY" if components == 1 else "RGB", min_height=1, min_width=1, strict=True)
    except Exception as error:  # noqa: BLE001 - ValueError, or what Cython makes of a file that is none
        return first_line(error)
    return None


_MAX_CACHED = 64
_cache: OrderedDict[tuple[str, int, int], TiffTiles | str] = OrderedDict()


def read_tiff_tiles(path: Path) -> TiffTiles | str:
    """The tile tables of a TIFF file, remembered while the file does not change; else what is wrong with them."""
    import tifffile

    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return "it is no regular file"
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    found = _cache.pop(key, None)
    if found is None:
        try:
            found = TiffTiles(path)
        except _ContradictionError as error:
            found = Contradiction(error)
        except (tifffile.TiffFileError, OSError, ValueError, IndexError, TypeError, KeyError, AttributeError,
                MemoryError, OverflowError, ZeroDivisionError, RuntimeError) as error:  # fmt: skip
            found = str(error) or type(error).__name__
    _cache[key] = found
    while len(_cache) > _MAX_CACHED:
        _cache.popitem(last=False)
    return found
