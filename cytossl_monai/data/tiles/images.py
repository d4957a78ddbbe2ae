"""Images that are not whole slides (folders of cells or frames, datalists), in the form that training reads."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from cytossl_monai.data.tiles.dataset import Item, Key, apply_transform, split_keys
from cytossl_monai.utils.errors import InputError, TableError
from cytossl_monai.utils.files import read_json, visible_files

__all__ = ["ImageFolder", "ImageRecord", "cut_field", "fit_square", "image_size", "list_images"]

Fill = Literal["reflect", "glass"]

_UNREADABLE = (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError)
"""What Pillow raises over damaged files, and over sizes that no memory holds."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class ImageRecord:
    """One image, or one place in it.

    Args:
        path: the file.
        label: its class, if known.
        group: what must not straddle a split and shares a sampling quota: patient, slide, class folder, or, where a
            table says none, the image.
        x: column of the centre to crop around; None: the whole image.
        y: row of that centre.
    """

    path: Path
    label: str | None = None
    group: str = ""
    x: float | None = None
    y: float | None = None


def list_images(source: str | os.PathLike[str], key: str = "training") -> list[ImageRecord]:
    """The images of a folder, a CSV table or a MONAI datalist, sorted by path within a folder.

    Args:
        source: a folder (``<class>/<image>``, or images directly, without labels); a ``.csv`` with the column ``image``
            or ``path`` and, as they apply, ``label`` or ``class``, ``group`` or ``patient_id``, ``x``, ``y``; a
            ``.json`` datalist with items ``{"image": ..., "label": ...}`` under ``key``. Relative paths are relative to
            the table; those of a table beside a folder ``images`` may also be relative to that folder.
        key: section of a datalist.

    Returns:
        one record an image.

    Raises:
        TableError: when the source does not exist, holds no image, or lacks the image column.
    """
    source = Path(source)
    if source.is_dir():
        files = [p for p in visible_files(source, "**/*") if p.suffix.lower() in SUFFIXES]
        if not files:
            raise TableError(f"no image ({', '.join(SUFFIXES)}) in {source}; give a folder of images")
        return [
            ImageRecord(p, p.parent.name if p.parent != source else None, str(p.parent.relative_to(source)))
            for p in files
        ]
    if not source.is_file():
        raise TableError(f"image source {source} does not exist; give a folder, a CSV table or a JSON datalist")
    if source.suffix.lower() == ".json":
        content = read_json(source, "give a datalist: a list of {'image': ...}", TableError)
        rows = content.get(key, []) if isinstance(content, dict) else content
        if not isinstance(rows, list):
            raise TableError(f"{source} holds no list of images but {type(rows).__name__}; give one entry an image")
    else:
        try:
            with open(source, newline="", encoding="utf-8-sig") as stream:
                rows = list(csv.DictReader(stream))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise TableError(f"{source} cannot be read as a table ({error}); save it as CSV in UTF-8") from error
    records = [_record(row, source, line) for line, row in enumerate(rows, start=1)]
    if not records:
        section = f" under {key!r}" if source.suffix.lower() == ".json" else ""
        raise TableError(f"{source} lists no image{section}; give one entry an image, with the key 'image'")
    return records


def _record(row: Any, table: Path, line: int) -> ImageRecord:
    if isinstance(row, str):
        row = {"image": row}
    if not isinstance(row, dict):
        raise TableError(f"{table}, entry {line}: {str(row)[:60]!r} is no image; give {{'image': its path}} there")
    name = row.get("image") or row.get("path")
    if not name:
        raise TableError(f"{table}, entry {line}: no 'image'; give the image's path there")
    path = table.parent / str(name)
    if not path.exists() and (table.parent / "images" / str(name)).exists():
        path = table.parent / "images" / str(name)
    label = row.get("label", row.get("class"))
    group = row.get("group", row.get("patient_id"))
    x, y = (_place(row.get(axis), axis, table, line) for axis in "xy")
    return ImageRecord(
        path,
        None if label in (None, "") else str(label),
        # Cells of one frame are alike whatever their class: the image holds them together, never the label.
        str(path) if group in (None, "") else str(group),
        x,
        y,
    )


def _place(value: Any, axis: str, table: Path, line: int) -> float | None:
    if value in (None, ""):
        return None
    try:
        place = float(value)
        if math.isfinite(place):
            return place
    except (TypeError, ValueError):
        pass
    raise TableError(f"{table}, entry {line}: {axis} is {str(value)[:60]!r}; give the pixel to crop around")


def cut_field(image: np.ndarray, x: float, y: float, side: int, fill: Fill = "reflect") -> np.ndarray:
    """Cut a square around a place, which stays in its middle; what lies beyond the image is filled.

    Args:
        image: (H, W, 3) uint8.
        x: column of the centre, the left border at 0.
        y: row of the centre.
        side: of the square in pixels.
        fill: ``"reflect"``: mirror the image at its borders, as often as it takes. ``"glass"``: the image's brightest
            colour (the 95th percentile of each channel), which in bright field is glass wherever there is some.

    Returns:
        (side, side, 3) uint8.
    """
    height, width = image.shape[:2]
    left, top = _corner(x, side), _corner(y, side)
    if left >= 0 and top >= 0 and left + side <= width and top + side <= height:
        return image[top : top + side, left : left + side]
    if fill == "reflect":
        rows, columns = _mirrored(top, side, height), _mirrored(left, side, width)
        return image[rows[:, None], columns[None, :]]
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = np.percentile(image.reshape(-1, 3), 95, axis=0).astype(np.uint8)
    box = _real_box(width, height, x, y, side)
    part = image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    square[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = part
    return square


def _corner(centre: float, side: int) -> int:
    return math.floor(centre - side / 2 + 0.5)


def _real_box(width: int, height: int, x: float, y: float, side: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the image's pixels in what ``cut_field`` gives."""
    left, top = _corner(x, side), _corner(y, side)
    return (
        float(max(0, -left)),
        float(max(0, -top)),
        float(min(side, width - left)),
        float(min(side, height - top)),
    )


def _mirrored(start: int, count: int, length: int) -> np.ndarray:
    """Numbers of ``count`` lines from ``start`` on in an image of ``length`` lines that goes on mirrored for ever."""
    places = np.arange(start, start + count) % (2 * length)
    return np.where(places < length, places, 2 * length - 1 - places)


def fit_square(image: np.ndarray, size: int, fill: Fill = "reflect") -> np.ndarray:
    """Pad an image to a square, itself in the middle, and resize it.

    Args:
        image: (H, W, 3) uint8.
        size: side of the result in pixels.
        fill: see ``cut_field``.

    Returns:
        (size, size, 3) uint8, area-averaged where it shrinks.
    """
    height, width = image.shape[:2]
    return _resized(cut_field(image, width / 2, height / 2, max(height, width), fill), size)


def _resized(square: np.ndarray, size: int) -> np.ndarray:
    if len(square) == size:
        return square
    # PIL's bicubic filter widens with the scale: it averages where it shrinks.
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))


class ImageFolder(Dataset[Item]):
    """A map-style data set over images, with the items that ``TileDataset`` gives.

    Args:
        source: see ``list_images``; or a list of ``ImageRecord``.
        size: side of the images it gives, pixels.
        mpp: micrometres per pixel of the files. A number: one for all.
        fit: ``"square"``: the whole image (or ``crop`` pixels around x, y where the record has them), padded to a
            square and resized to ``size``; ``mpp`` changes with it. ``"tile"``: large frames are cut into a grid of
            tiles of ``size`` pixels read at ``tile_mpp``, each an item of its own.
        crop: side in pixels of the file of what is cut out around a record's centre.
        tile_mpp: with ``fit="tile"``, the scale to read at; default: the file's own.
        transform: applied to each item in the worker.
        cache: keep the decoded, resized images in memory (uint8): for sets of some thousand small images.
        fill: what stands beyond an image that is smaller than its field, or not square; see ``cut_field``. Items say in
            ``valid``, float32 (left, top, right, bottom) in pixels of the item, where the real pixels lie.

    Attributes:
        labels: list of class names or None, one an item.
        groups: (n,) int64, the number of each item's group.
        group_names: list of str, one an item, for splits.

    Raises:
        TableError: when there is no image.
        InputError: while reading, when a file is missing or is no image.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[ImageRecord],
        size: int = 224,
        mpp: float = 0.5,
        fit: Literal["square", "tile"] = "square",
        crop: int = 128,
        tile_mpp: float | None = None,
        transform: Callable[[Item], Item] | None = None,
        cache: bool = False,
        fill: Fill = "reflect",
    ) -> None:
        if fill not in ("reflect", "glass"):
            raise ValueError(f"fill must be 'reflect' or 'glass', got {fill!r}")
        if fit not in ("square", "tile"):
            raise ValueError(f"fit must be 'square' or 'tile', got {fit!r}")
        if size < 1 or crop < 1 or mpp <= 0:
            raise ValueError(f"size, crop and mpp must be above zero, got {size}, {crop}, {mpp}")
        records = list_images(source) if isinstance(source, str | os.PathLike) else list(source)
        if not records:
            raise TableError("no image to read; give a folder or a table that lists some")
        self.size, self.mpp, self.fit, self.crop, self.transform = size, float(mpp), fit, crop, transform
        self.fill: Fill = fill
        self.scale = 1.0 if tile_mpp is None else float(tile_mpp) / self.mpp
        self.side = max(1, round(size * self.scale))
        self.records: list[ImageRecord] = []
        for record in records:
            self.records += self._grid(record) if fit == "tile" else [record]
        self.labels = [record.label for record in self.records]
        self.group_names = [record.group for record in self.records]
        self.groups: np.ndarray = np.unique(self.group_names, return_inverse=True)[1].astype(np.int64)
        self.weights: np.ndarray | None = None
        self._cache: dict[int, tuple[np.ndarray, float]] | None = {} if cache else None
        self._last: tuple[Path, np.ndarray] | None = None
        self._sizes: dict[Path, tuple[int, int]] = {}

    def _grid(self, record: ImageRecord) -> list[ImageRecord]:
        """Evenly spread tile centres that cover a frame; the last ones overlap rather than leave a rest."""
        width, height = image_size(record.path)
        columns, rows = (max(1, math.ceil(extent / self.side)) for extent in (width, height))
        xs = np.linspace(min(self.side, width) / 2, width - min(self.side, width) / 2, columns)
        ys = np.linspace(min(self.side, height) / 2, height - min(self.side, height) / 2, rows)
        return [ImageRecord(record.path, record.label, record.group, float(x), float(y)) for y in ys for x in xs]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def tile(self) -> tuple[int, float] | None:
        """Side in pixels and micrometres per pixel of the items; None where each image is resized in its own way."""
        if self.fit == "tile":
            return self.size, self.mpp * self.side / self.size
        if all(record.x is not None and record.y is not None for record in self.records):
            return self.size, self.mpp * self.crop / self.size
        return None

    def tile_um(self, sample: int = 200) -> float:
        """Side in um of the real part of an item, the median of the items (of ``sample`` of them, evenly drawn)."""
        numbers = np.unique(np.linspace(0, len(self.records) - 1, min(sample, len(self.records))).astype(int))
        sides = []
        for record in (self.records[number] for number in numbers):
            width, height = image_size(record.path)
            if record.x is not None and record.y is not None:
                side = self.side if self.fit == "tile" else self.crop
                width, height = min(width, side), min(height, side)
            sides.append(math.sqrt(width * height) * self.mpp)
        return float(np.median(sides))

    def _field(self, number: int, width: int, height: int) -> tuple[float, float, int]:
        """Centre and side of what is cut out of an image of that size.

        Raises:
            InputError: when the record's place lies outside of it.
        """
        record = self.records[number]
        if record.x is None or record.y is None:
            return width / 2, height / 2, max(height, width)
        if not (0 <= record.x <= width and 0 <= record.y <= height):
            raise InputError(
                f"image {record.path}: the place ({record.x:g}, {record.y:g}) lies outside of its {width} x {height} "
                "px; correct the table"
            )
        return record.x, record.y, self.side if self.fit == "tile" else self.crop

    def _read(self, number: int) -> tuple[np.ndarray, float]:
        """(3, size, size) uint8 and the micrometres per pixel of the result."""
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        record = self.records[number]
        if self._last is None or self._last[0] != record.path:  # places in one frame often follow each other
            self._last = record.path, _load_rgb(record.path)
        image = self._last[1]
        x, y, side = self._field(number, image.shape[1], image.shape[0])
        square = _resized(cut_field(image, x, y, side, self.fill), self.size)
        result = np.ascontiguousarray(square.transpose(2, 0, 1)), self.mpp * side / self.size
        if self._cache is not None:
            self._cache[number] = result
        return result

    def __getitems__(self, keys: Sequence[Key]) -> list[Item]:
        """Read many images."""
        items = []
        for number, sample in zip(*split_keys(keys)):
            image, mpp = self._read(int(number))
            about = self.about(int(number), int(sample))
            items.append({"image": torch.from_numpy(image), "mpp": np.float32(mpp), **about})
        return apply_transform(self.transform, items)

    def about(self, number: int, sample: int) -> Item:
        """What an item says beside its pixels and their scale: ``valid``, ``slide_id``, ``x``, ``y``, ``sample``."""
        record = self.records[number]
        size = self._sizes.get(record.path)
        if size is None:
            size = self._sizes[record.path] = image_size(record.path)
        x, y, side = self._field(number, *size)
        valid = torch.tensor(_real_box(*size, x, y, side)) * (self.size / side)
        place = {"x": int(record.x or 0), "y": int(record.y or 0)}
        return {"valid": valid, "slide_id": record.path.stem, **place, "sample": sample}

    def cache_key(self) -> dict[str, Any]:
        """What the pixels of the items depend on, for `TileCache`: files, arrays and settings."""
        places = [[np.nan if at is None else at for at in (r.x, r.y)] for r in self.records]
        names = [str(record.path) for record in self.records]
        settings: dict[str, Any] = {
            "fill": self.fill,
            "size": self.size,
            "mpp": self.mpp,
            "fit": self.fit,
            "crop": self.crop,
            "side": self.side,
        }
        return {"files": sorted(set(names)), "arrays": [np.asarray(places)], "settings": {**settings, "names": names}}

    def __getitem__(self, key: Key) -> Item:
        return self.__getitems__([key])[0]


def _load_rgb(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise InputError(f"image {path} does not exist; correct its path in the table") from error
    except _UNREADABLE as error:
        raise InputError(f"image {path} cannot be read ({error}); leave it out or replace it") from error


def image_size(path: Path) -> tuple[int, int]:
    """Width and height from the file's header."""
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError as error:
        raise InputError(f"image {path} does not exist; correct its path in the table") from error
    except _UNREADABLE as error:
        raise InputError(f"image {path} cannot be read ({error}); leave it out or replace it") from error
