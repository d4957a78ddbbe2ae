"""The slide table: which slides there are, where they lie, whose they are and what is known about them."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cytossl_monai.data.slide_record import SlideRecord
from cytossl_monai.data.table_checks import (
    COLUMNS,
    UNNAMED,
    check_columns,
    check_keys,
    check_spelling,
    check_split,
    check_unique,
    warn_of_shared_files,
)
from cytossl_monai.utils.cells import plain_cell, stored_cell
from cytossl_monai.utils.errors import TableError
from cytossl_monai.utils.files import atomic_path, encodable

__all__ = ["SlideRecord", "encode_labels", "id_of_file", "known_negative", "read_slide_table", "write_slide_table"]

logger = logging.getLogger(__name__)

NEGATIVE_NAMES = ("negative", "nilm", "normal", "benign", "0")
"""What tables call the class of slides on which nothing suspicious lies, in any case; the first that occurs counts."""
SECTIONS = ("train", "training", "val", "valid", "validation", "test", "testing", "infer", "inference")
"""Sections of a datalist that may list bare paths; in others only items with ``image`` or ``path`` are slides."""

_UNSAFE_ID = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f\ud800-\udfff]|^\.|\.$')
"""What a file name does not hold on every system; halves of characters are bytes that are not UTF-8."""
_NO_UTF8 = re.compile("[\udc80-\udcff]")
_RESERVED_ID = re.compile(
    r"(index\.html|predictions\.csv|report\.csv|con|prn|aux|nul|com[0-9]|lpt[0-9])(\.[^.]*)?", re.IGNORECASE
)
"""Names of this program's own files beside the slides' folders, and those that Windows keeps for devices."""

_MAX_ID_BYTES = 200
_MAX_FOLD = 9999

_NO_VALUE = frozenset({"nan", "na", "n/a", "<na>", "#n/a", "null"})
"""What pandas, R and Excel write where there is no value."""


def read_slide_table(path: str | os.PathLike[str]) -> list[SlideRecord]:
    """Read a slide table (CSV) or a MONAI datalist (JSON).

    CSV: columns ``slide_id`` and ``path``; ``label``, ``patient_id``, ``fold``, ``mpp`` and any others may be there;
    comma, semicolon or tab between them; columns without a name (the index that pandas writes, trailing commas) are
    passed over, and "nan" or "NA" as label or patient counts as empty. JSON: a list of items, or sections
    (``training``, ``validation``, ``testing``) of such lists; an item has ``image`` or ``path``, and may have
    ``slide_id`` (else the file's stem), ``label``, ``patient_id``, ``fold``, ``mpp``. Relative paths are relative to
    the table. Whether the slides exist is not looked at: a missing slide is one slide's failure, not the table's.

    Args:
        path: the table.

    Returns:
        the records in the table's order.

    Raises:
        TableError: when the table is missing, empty, without the needed columns, when a slide_id occurs twice or cannot
            be a file name, when ``fold`` or ``mpp`` is no number, when a known column is spelt otherwise (MPP), when a
            label or patient is written in two ways (1 and 1.0, P1 and p1), or when a patient is on both sides of a
            given split.
    """
    path = Path(path)
    if not path.is_file():
        raise TableError(f"slide table {path} does not exist; give the path of a CSV with the columns slide_id,path")
    rows = _rows_of_json(path) if path.suffix.lower() == ".json" else _rows_of_csv(path)
    records = [_record(row, where, path) for where, row in rows]
    if not records:
        raise TableError(f"slide table {path} lists no slides; add one line for each slide")
    check_unique(records, path)
    check_spelling(records, path)
    check_split(records, path)
    warn_of_shared_files(records, path)
    labelled = [r for r in records if r.label is not None]
    no_value = sum(_text(row.get("label")) is not None for _, row in rows) - len(labelled)
    if no_value:
        logger.warning("slide table %s: the label of %d slides says that there is none (NA, nan)", path, no_value)
    if labelled and all(r.patient_id == r.slide_id for r in records) and "patient_id" not in rows[0][1]:
        logger.warning(
            "slide table %s has no column patient_id: every slide counts as a patient of its own, and two slides of "
            "one patient may fall on both sides of a split",
            path,
        )
    return records


def id_of_file(path: Path) -> str:
    """A slide_id for a slide that no table names: the file's stem, made a name that the table would take.

    Bytes that are not UTF-8 (names from an old share) become their two digits: two names that differ stay two.
    """
    stem = _NO_UTF8.sub(lambda found: f"_{ord(found[0]) & 0xFF:02x}", path.stem.strip().lstrip("."))
    name = _UNSAFE_ID.sub("_", stem).encode()[:_MAX_ID_BYTES].decode("utf-8", "ignore")
    return f"{name}_slide" if _RESERVED_ID.fullmatch(name) else name or "slide"


def write_slide_table(path: str | os.PathLike[str], records: Iterable[SlideRecord]) -> Path:
    """Write records as a CSV slide table, atomically. Paths inside the table's folder become relative.

    Args:
        path: the CSV to write.
        records: what to write; keys of ``extra`` become columns.

    Returns:
        the path written.
    """
    path = Path(path)
    records = list(records)
    extra = list(dict.fromkeys(key for r in records for key in r.extra))
    used = [c for c in COLUMNS if c in ("slide_id", "path") or any(getattr(r, c) is not None for r in records)]
    root = path.parent.resolve()
    with atomic_path(path) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([*used, *(plain_cell(name) for name in extra)])
        for r in records:
            row: dict[str, Any] = {c: getattr(r, c) for c in used}
            row["path"] = r.path.relative_to(root) if r.path.is_relative_to(root) else r.path
            values = [row[c] for c in used] + [r.extra.get(c) for c in extra]
            writer.writerow(["" if v is None else plain_cell(str(v)) for v in values])
    return path


def known_negative(classes: Iterable[str]) -> str | None:
    """The class that is called as in ``NEGATIVE_NAMES``; None where none is."""
    lower = {name.lower(): name for name in reversed(list(classes))}  # of two spellings the first
    return next((lower[name] for name in NEGATIVE_NAMES if name in lower), None)


def encode_labels(records: Sequence[SlideRecord], classes: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """Class numbers of the records.

    Args:
        records: slides that all have a label.
        classes: the classes in order; None takes those that occur, sorted as numbers when all are whole numbers, else
            by name, one that is called as in ``NEGATIVE_NAMES`` first.

    Returns:
        int64 array (n,) of indices into the classes, and the classes.

    Raises:
        TableError: when a slide has no label, or one that is not among ``classes``.
        ValueError: when ``classes`` names one class twice.
    """
    missing = [r.slide_id for r in records if r.label is None]
    if missing:
        raise TableError(f"{_some(missing)} without a label; fill the column label or leave the slide out")
    labels = [str(r.label) for r in records]
    if classes is None:
        found = set(labels)
        if all(re.fullmatch(r"[+-]?\d+", name) for name in found):
            names = sorted(found, key=int)
        else:
            negative = known_negative(sorted(found))
            names = sorted(found, key=lambda name: (name != negative, name))
    else:
        names = [str(c) for c in classes]
        if len(set(names)) != len(names):
            raise ValueError(f"classes names a class twice: {names}")
    number = {name: i for i, name in enumerate(names)}
    for record, label in zip(records, labels):
        if label not in number:
            raise TableError(
                f"slide {record.slide_id} has the label {label!r}, which is none of the classes {names}; "
                "correct the label or add the class"
            )
    return np.array([number[label] for label in labels], dtype=np.int64), names


def _rows_of_csv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise TableError(f"slide table {path} is not UTF-8 text; save it as CSV (UTF-8)") from None
    header = next((line.strip() for line in text.splitlines() if line.strip()), "")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    names: list[str] | None = None
    rows: list[tuple[str, dict[str, Any]]] = []
    try:
        for cells in reader:
            values = [stored_cell(cell.strip()) for cell in cells]
            if not any(values):
                continue
            if names is None:
                names = values
                check_columns(names, header, path)
                continue
            where = f"line {reader.line_num}"
            if any(values[len(names) :]):
                raise TableError(f"slide table {path}, {where}: more values than columns; quote a value with a comma")
            row = {name: value for name, value in zip(names, values) if not UNNAMED.fullmatch(name)}
            if any(row.values()):
                named = [name for name in names if not UNNAMED.fullmatch(name)]
                rows.append((where, {**dict.fromkeys(named, ""), **row}))
    except csv.Error as error:
        raise TableError(f"slide table {path} is not readable as CSV: {error}; check its quotes") from error
    if names is None:
        check_columns([], header, path)
    return rows


def _rows_of_json(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or nesting without end
        raise TableError(f"datalist {path} is not readable as JSON: {error}; check the file") from error
    sections: dict[str | None, Any]
    if isinstance(content, list):
        sections = {None: content}
    elif isinstance(content, dict):
        sections = {
            key: value for key, value in content.items() if isinstance(value, list) and _lists_slides(key, value)
        }
    else:
        sections = {}
    rows: list[tuple[str, dict[str, Any]]] = []
    for section, items in sections.items():
        for number, item in enumerate(items):
            where = f"item {number}" + (f" of {section!r}" if section else "")
            if not isinstance(item, (str, dict)):
                raise TableError(
                    f"datalist {path}, {where} is {str(item)[:60]!r}, no path and no item with 'image'; correct it"
                )
            row: dict[str, Any] = {"image": item} if isinstance(item, str) else dict(item)
            slide = row.pop("image", None) or row.get("path")
            if not isinstance(slide, str):
                raise TableError(f"datalist {path}, {where}: no path under 'image' or 'path'; add one")
            row["path"] = slide
            check_keys(row, f"datalist {path}, {where}", "key")
            row.setdefault("slide_id", Path(slide).name.split(".")[0])
            if section:
                row.setdefault("split", section)
            rows.append((where, row))
    return rows


def _lists_slides(section: str, items: list[Any]) -> bool:
    """Whether a list of a datalist holds slides: others ("labels", "modality") describe the set."""
    if section.casefold() in SECTIONS:
        return True
    return bool(items) and all(isinstance(item, dict) and ("image" in item or "path" in item) for item in items)


def _record(row: Mapping[str, Any], where: str, table: Path) -> SlideRecord:
    at = f"slide table {table}, {where}"
    slide_id = _text(row.get("slide_id"))
    if slide_id is None:
        raise TableError(f"{at}: slide_id is empty; give every slide a name")
    too_long = len(slide_id.encode("utf-8", "replace")) > _MAX_ID_BYTES
    if too_long or _UNSAFE_ID.search(slide_id) or _RESERVED_ID.fullmatch(slide_id):
        why = "is too long for a file name" if too_long else "cannot be a file name"
        why = "is the name of another file" if _RESERVED_ID.fullmatch(slide_id) else why
        raise TableError(f"{at}: slide_id {slide_id[:80]!r} {why}; use letters, digits, '-', '_' and '.'")
    path = _text(row.get("path"))
    if path is None or "\0" in path:
        raise TableError(f"{at}: slide {slide_id} has no path; fill the column path")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # JSON can hold half a character; a byte of a name that is not UTF-8 is one that may be
        raise TableError(f"{at}: the path {path!r} holds what no file name can; correct it") from None
    try:
        place = Path(path).expanduser()
    except RuntimeError:
        raise TableError(f"{at}: the path {path!r} names a home folder that there is not; correct it") from None
    mpp = _number(row.get("mpp"), "mpp", at)
    if mpp is not None and not 0.01 <= mpp <= 100:
        raise TableError(f"{at}: mpp is {mpp:g}, but a scan has 0.01 to 100 micrometres per pixel; correct it")
    fold = _number(row.get("fold"), "fold", at)
    if fold is not None and (fold != int(fold) or not 0 <= fold <= _MAX_FOLD):
        raise TableError(f"{at}: fold is {fold:g}; give a whole number from 0 to {_MAX_FOLD}")
    return SlideRecord(
        slide_id=slide_id,
        path=table.parent.resolve() / place,
        label=_value(row.get("label")),
        patient_id=_value(row.get("patient_id")) or slide_id,
        fold=None if fold is None else int(fold),
        mpp=mpp,
        extra={key: value for key, value in row.items() if key not in COLUMNS},
    )


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    return str(value).strip() or None


def _value(value: Any) -> str | None:
    """Text, or None for what other programs write where there is none."""
    text = _text(value)
    return None if text is None or text.casefold() in _NO_VALUE else encodable(text)


def _number(value: Any, name: str, at: str) -> float | None:
    text = _text(value)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise TableError(f"{at}: {name} is {text!r}, which is no number; correct it or leave it empty")
    return number


def _some(names: Sequence[str], at_most: int = 5) -> str:
    told = ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
    return f"{'slide' if len(names) == 1 else 'slides'} {told}"
