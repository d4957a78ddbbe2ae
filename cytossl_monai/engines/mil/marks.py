"""Cells that somebody marked on slides, joined with the cells (or tiles) of their bags."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cytossl_monai.data.bags.features import Features, read_features
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.transforms.nuclei.imported import classified_places
from cytossl_monai.utils.errors import FeatureError, InputError, TableError, reason
from cytossl_monai.utils.files import read_json, visible_files

__all__ = ["with_marks"]

logger = logging.getLogger(__name__)

_SUFFIXES = (".geojson", ".json")
_COLUMNS = ("slide_id", "x", "y", "label")

Mark = tuple[str, str, float, float]
"""Where it was read, class, x and y in level-0 pixels."""


def with_marks(items: Sequence[dict[str, Any]], marks: str | os.PathLike[str] | None) -> list[dict[str, Any]]:
    """Items of bags with the cells that somebody marked in them.

    A mark says that this cell is of that class, such as a lesion cell that a cytologist has seen. It is of the tile
    that it lies in, or, where bags hold cells (``instances: nuclei``), of the nearest nucleus in whose field it lies.

    Args:
        items: of `bag_items`, labelled, of one class each.
        marks: a folder with a file of each slide that has any, ``<slide_id>.geojson`` as QuPath exports it: points or
            outlines, classified by the names of the slides' classes, in pixels of the whole slide. Or a CSV table with
            the columns ``slide_id``, ``x``, ``y`` (level-0 pixels) and ``label``. None: nothing is marked.

    Returns:
        copies of the items; those with marked cells have ``marks``, a list of pairs: row of the bag, number of the
        class. Marks of the first, negative class are left out: all cells of its slides stand for it.

    Raises:
        InputError: when nothing there can be read, or no mark is of one of the classes.
        TableError: for a table without the columns, marks in a slide of the negative class, or of a multilabel target.
        FeatureError: when no mark lies on a cell of its bag, or the feature file does not say where its cells are.
    """
    items = [dict(item) for item in items]
    if marks is None:
        return items
    source = Path(marks)
    if any(np.ndim(item["label"]) for item in items):
        raise TableError(f"marks {source} are of one class each, and the slides' labels are not (target multilabel)")
    known = {item["slide_id"]: item for item in items}
    found = _by_slide(source, known)
    classes = [str(name) for name in items[0]["classes"]]
    lost, total = [], 0
    for slide_id, own in _of_classes(found, classes, source).items():
        item = known[slide_id]
        where, number = own[0][:2]
        if item["label"] == 0:
            raise TableError(
                f"slide {slide_id} is {item['label_name']}, but a cell in it is marked {classes[number]} "
                f"({where}); correct one of the two"
            )
        at = _rows(item["features"], np.array([mark[2:] for mark in own], dtype=np.float64), where)
        pairs = {(int(row), mark[1]) for row, mark in zip(at, own, strict=True) if row >= 0}
        item["marks"] = [list(pair) for pair in sorted(pairs)]
        lost += [slide_id] * int((at < 0).sum())
        total += len(own)
    if lost and len(lost) == total:
        raise FeatureError(
            f"marks {source}: none of the {total} lies on a cell or tile that was embedded; places must be pixels of "
            "the whole slide, and the features those of the same slides"
        )
    if lost:
        logger.warning(
            "%d of %d marks lie on no cell or tile that was embedded (%s)",
            len(lost),
            total,
            ", ".join(sorted(set(lost))),
        )
    logger.info("%d cells marked on %d slides", total - len(lost), sum("marks" in item for item in items))
    return items


def _by_slide(source: Path, known: dict[str, Any]) -> dict[str, list[Mark]]:
    """The marks of each slide that has any; those of slides that are not known are named and left out."""
    marks: dict[str, list[Mark]] = {}
    unknown: set[str] = set()
    for slide_id, mark in _table(source) if source.is_file() else _folder(source):
        if slide_id in known:
            marks.setdefault(slide_id, []).append(mark)
        else:
            unknown.add(slide_id)
    if not marks:
        seen = f"; it has marks of {', '.join(sorted(unknown)[:5])}" if unknown else ""
        raise InputError(
            f"marks {source}: none of a slide of the table{seen}; files are called <slide_id>.geojson, or a CSV table "
            f"has the columns {', '.join(_COLUMNS)}"
        )
    if unknown:
        logger.warning("marks of slides that are not in the training are left out: %s", ", ".join(sorted(unknown)))
    return marks


def _of_classes(
    found: dict[str, list[Mark]], classes: Sequence[str], source: Path
) -> dict[str, list[tuple[str, int, float, float]]]:
    """The marks of each slide that are of a class but the first, by its number; other names are told."""
    number = {name.casefold(): k for k, name in enumerate(classes)}
    numbered: dict[str, list[tuple[str, int, float, float]]] = {}
    strangers: set[str] = set()
    for slide_id, rows in found.items():
        for where, name, x, y in rows:
            kind = number.get(name.casefold())
            if kind is None:
                strangers.add(name)
            elif kind:
                numbered.setdefault(slide_id, []).append((where, kind, x, y))
    if not numbered:
        raise InputError(
            f"marks {source}: no object is classified as {' or '.join(classes[1:])} "
            f"(found: {', '.join(sorted(strangers)[:5]) or 'none that is classified'}); give marked cells the name of "
            "their slide's class"
        )
    if strangers:
        others, known = ", ".join(sorted(strangers)), ", ".join(classes)
        logger.warning("marks of %s are left out: the slides' classes are %s", others, known)
    return numbered


def _folder(folder: Path) -> Iterator[tuple[str, Mark]]:
    for path in [path for suffix in _SUFFIXES for path in visible_files(folder, f"*{suffix}")]:
        content = read_json(path, "export the objects from QuPath again")
        for name, places in classified_places(content, str(path)):
            for x, y in places.tolist():
                yield path.stem, (str(path), name, x, y)


def _table(path: Path) -> Iterator[tuple[str, Mark]]:
    try:
        table = pd.read_csv(path, dtype={"slide_id": str, "label": str})
        if absent := [name for name in _COLUMNS if name not in table.columns]:
            raise ValueError(f"it has no column {absent[0]}")
        places = table[["x", "y"]].to_numpy(dtype=np.float64)
        if not np.isfinite(places).all() or table[["slide_id", "label"]].isna().any().any():
            raise ValueError("a row lacks a value")
    except (ValueError, OSError) as error:
        raise TableError(
            f"marks {path}: cannot be read as a table ({reason(error)}); it has the columns {', '.join(_COLUMNS)}"
        ) from error
    for slide_id, name, (x, y) in zip(table["slide_id"], table["label"], places.tolist(), strict=True):
        yield slide_id, (str(path), name, x, y)


def _rows(features: str, places: np.ndarray, where: str) -> np.ndarray:
    """(n,) row of the bag that each place (n, 2) lies on, -1 for none."""
    bag = read_features(features)
    side = float(bag.attrs.get("patch_size_level0", 0))
    if side <= 0 or (bag.coords < 0).all():
        raise FeatureError(
            f"feature file {features} does not say where its cells or tiles lie, and {where} marks some; embed the "
            "slide with embed.json"
        )
    if where.lower().endswith(_SUFFIXES):
        places = places + _bounds_offset(bag)
    centres = bag.coords + side / 2
    apart = places[:, None, :] - centres[None]
    nearest = np.square(apart).sum(axis=2).argmin(axis=1)
    off = np.abs(apart[np.arange(len(places)), nearest])
    return np.where((off <= side / 2).all(axis=1), nearest, -1)


def _bounds_offset(bag: Features) -> np.ndarray:
    """(2,) x, y that QuPath takes from the places of an MRXS slide."""
    path = Path(str(bag.attrs.get("slide_path", "")))
    if path.suffix.lower() != ".mrxs":
        return np.zeros(2)
    with open_slide(path, mpp=bag.attrs.get("level0_mpp")) as slide:
        return np.asarray(slide.bounds_offset, dtype=np.float64)
