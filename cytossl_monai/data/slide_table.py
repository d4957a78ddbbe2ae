"""The slide table: which slides there are, where they lie, whose they are and what is known about them."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cytossl_monai.utils.errors import TableError
from cytossl_monai.utils.files import atomic_path

__all__ = ["SlideRecord", "encode_labels", "read_slide_table", "write_slide_table"]

logger = logging.getLogger(__name__)

COLUMNS = ("slide_id", "path", "label", "patient_id", "fold", "mpp")
_UNSAFE_ID = re.compile(r'[/\\:*?"<>|\x00-\x1f]')


@dataclass(frozen=True)
class SlideRecord:
    """One slide of the table.

    Args:
        slide_id: unique name; the index, the features and the predictions are filed under it.
        path: the slide, absolute.
        label: class of the slide as text; None when it is not known.
        patient_id: whose slide it is. Slides of one patient never lie on both sides of a split.
        fold: number of the fold or None when folds are still to be drawn.
        mpp: micrometres per pixel at level 0, when the file does not say or says it wrong.
        extra: the table's other columns, as text (datalist: as they are); a datalist's section under ``"split"``.
    """

    slide_id: str
    path: Path
    label: str | None
    patient_id: str
    fold: int | None = None
    mpp: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def read_slide_table(path: str | os.PathLike[str]) -> list[SlideRecord]:
    """Read a slide table (CSV) or a MONAI datalist (JSON).

    CSV: columns ``slide_id`` and ``path``; ``label``, ``patient_id``, ``fold``, ``mpp`` and any others may be there;
    comma, semicolon or tab between them. JSON: a list of items, or sections (``training``, ``validation``, ``testing``)
    of such lists; an item has ``image`` or ``path``, and may have ``slide_id`` (else the file's stem), ``label``,
    ``patient_id``, ``fold``, ``mpp``. Relative paths are relative to the table. Whether the slides exist is not looked
    at: a missing slide is one slide's failure, not the table's.

    Args:
        path: the table.

    Returns:
        the records in the table's order.

    Raises:
        TableError: when the table is missing, empty, without the needed columns, when a slide_id occurs twice or cannot
            be a file name, when ``fold`` or ``mpp`` is no number, or when a patient is on both sides of a given split.
    """
    path = Path(path)
    if not path.is_file():
        raise TableError(f"slide table {path} does not exist; give the path of a CSV with the columns slide_id,path")
    rows = _rows_of_json(path) if path.suffix.lower() == ".json" else _rows_of_csv(path)
    records = [_record(row, where, path) for where, row in rows]
    if not records:
        raise TableError(f"slide table {path} lists no slides; add one line for each slide")
    _check_unique(records, path)
    _check_split(records, path)
    labelled = [r for r in records if r.label is not None]
    if labelled and all(r.patient_id == r.slide_id for r in records) and "patient_id" not in rows[0][1]:
        logger.warning(
            "slide table %s has no column patient_id: every slide counts as a patient of its own, and two slides of "
            "one patient may fall on both sides of a split",
            path,
        )
    return records


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
        writer.writerow([*used, *extra])
        for r in records:
            row: dict[str, Any] = {c: getattr(r, c) for c in used}
            row["path"] = r.path.relative_to(root) if r.path.is_relative_to(root) else r.path
            values = [row[c] for c in used] + [r.extra.get(c) for c in extra]
            writer.writerow(["" if v is None else v for v in values])
    return path


def encode_labels(records: Sequence[SlideRecord], classes: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """Class numbers of the records.

    Args:
        records: slides that all have a label.
        classes: the classes in order; None takes those that occur, sorted (as numbers when all are whole numbers).

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
        names = sorted(found, key=int) if all(re.fullmatch(r"[+-]?\d+", n) for n in found) else sorted(found)
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
    header = text.partition("\n")[0].strip()
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True)
    names = [name.strip() for name in reader.fieldnames or []]
    absent = [c for c in ("slide_id", "path") if c not in names]
    if absent:
        raise TableError(
            f"slide table {path} has no column {' and no column '.join(absent)}; "
            f"its first line must name slide_id and path, it says {header[:120]!r}"
        )
    if len(set(names)) != len(names):
        raise TableError(f"slide table {path} names a column twice in its first line: {header[:120]!r}")
    reader.fieldnames = names
    rows: list[tuple[str, dict[str, Any]]] = []
    try:
        for row in reader:
            where = f"line {reader.line_num}"
            if "" in row:
                raise TableError(f"slide table {path}, {where}: more values than columns; quote a value with a comma")
            cells = {key: (value or "").strip() for key, value in row.items()}
            if any(cells.values()):
                rows.append((where, cells))
    except csv.Error as error:
        raise TableError(f"slide table {path} is not readable as CSV: {error}; check its quotes") from error
    return rows


def _rows_of_json(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TableError(f"datalist {path} is not readable as JSON: {error}; check the file") from error
    sections: dict[str | None, Any]
    if isinstance(content, list):
        sections = {None: content}
    elif isinstance(content, dict):
        # A datalist's other keys ("name", "labels", "numTraining") describe it; only lists of items hold slides.
        sections = {
            key: value
            for key, value in content.items()
            if isinstance(value, list) and value and all(isinstance(item, (dict, str)) for item in value)
        }
    else:
        sections = {}
    rows: list[tuple[str, dict[str, Any]]] = []
    for section, items in sections.items():
        for number, item in enumerate(items):
            where = f"item {number}" + (f" of {section!r}" if section else "")
            row: dict[str, Any] = {"image": item} if isinstance(item, str) else dict(item)
            slide = row.pop("image", None) or row.get("path")
            if not isinstance(slide, str):
                raise TableError(f"datalist {path}, {where}: no path under 'image' or 'path'; add one")
            row["path"] = slide
            row.setdefault("slide_id", Path(slide).name.split(".")[0])
            if section:
                row.setdefault("split", section)
            rows.append((where, row))
    return rows


def _record(row: Mapping[str, Any], where: str, table: Path) -> SlideRecord:
    at = f"slide table {table}, {where}"
    slide_id = _text(row.get("slide_id"))
    if slide_id is None:
        raise TableError(f"{at}: slide_id is empty; give every slide a name")
    if _UNSAFE_ID.search(slide_id) or slide_id in (".", "..") or slide_id.startswith("."):
        raise TableError(f"{at}: slide_id {slide_id!r} cannot be a file name; use letters, digits, '-', '_' and '.'")
    path = _text(row.get("path"))
    if path is None:
        raise TableError(f"{at}: slide {slide_id} has no path; fill the column path")
    mpp = _number(row.get("mpp"), "mpp", at)
    if mpp is not None and not 0.01 <= mpp <= 100:
        raise TableError(f"{at}: mpp is {mpp:g}, but a scan has 0.01 to 100 micrometres per pixel; correct it")
    fold = _number(row.get("fold"), "fold", at)
    if fold is not None and (fold != int(fold) or fold < 0):
        raise TableError(f"{at}: fold is {fold:g}; give a whole number from 0")
    return SlideRecord(
        slide_id=slide_id,
        path=(table.parent.resolve() / Path(path).expanduser()),
        label=_text(row.get("label")),
        patient_id=_text(row.get("patient_id")) or slide_id,
        fold=None if fold is None else int(fold),
        mpp=mpp,
        extra={key: value for key, value in row.items() if key not in COLUMNS},
    )


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    return str(value).strip() or None


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


def _check_unique(records: Sequence[SlideRecord], path: Path) -> None:
    first: dict[str, SlideRecord] = {}
    for record in records:
        # Two names that differ in case alone are one file on Windows and macOS.
        key = record.slide_id.casefold()
        if key in first:
            raise TableError(
                f"slide table {path} lists slide_id {record.slide_id!r} twice ({first[key].path} and {record.path}); "
                "give every slide a name of its own"
            )
        first[key] = record


def _check_split(records: Sequence[SlideRecord], path: Path) -> None:
    sides: dict[str, dict[str, str]] = {}
    for record in records:
        for kind, side in (("fold", record.fold), ("split", record.extra.get("split"))):
            if side in (None, ""):
                continue
            known = sides.setdefault(f"{kind}/{record.patient_id}", {"side": str(side), "slide": record.slide_id})
            if known["side"] != str(side):
                raise TableError(
                    f"slide table {path}: patient {record.patient_id} is on both sides of the {kind}: slide "
                    f"{known['slide']} in {known['side']}, slide {record.slide_id} in {side}; put all slides of a "
                    "patient on one side"
                )


def _some(names: Sequence[str], at_most: int = 5) -> str:
    told = ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
    return f"{'slide' if len(names) == 1 else 'slides'} {told}"
