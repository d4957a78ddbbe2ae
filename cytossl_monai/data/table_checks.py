"""What is refused or said of a slide table as a whole: names that clash, spellings that differ, splits that leak."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from cytossl_monai.data.slide_record import SlideRecord
from cytossl_monai.utils.errors import TableError

__all__ = [
    "COLUMNS",
    "UNNAMED",
    "check_columns",
    "check_keys",
    "check_spelling",
    "check_split",
    "check_unique",
    "spelt_twice",
    "warn_of_shared_files",
]

logger = logging.getLogger(__name__)

COLUMNS = ("slide_id", "path", "label", "patient_id", "fold", "mpp")
UNNAMED = re.compile(r"(Unnamed: \d+(_level_\d+)?)?")
"""A column without a name: a table's trailing commas, or the index that pandas wrote."""

_KNOWN = {name.replace("_", ""): name for name in (*COLUMNS, "split")}
_BETWEEN_WORDS = re.compile(r"[\s_-]+")
_WHOLE_AS_FRACTION = re.compile(r"^([+-]?\d+)\.0+$")


def check_columns(names: Sequence[str], header: str, path: Path) -> None:
    """Refuse a CSV whose first line lacks a needed column, names one twice, or spells a known one in its own way."""
    check_keys(names, f"slide table {path}", "column")
    absent = [c for c in ("slide_id", "path") if c not in names]
    if absent:
        raise TableError(
            f"slide table {path} has no column {' and no column '.join(absent)}; "
            f"its first line must name slide_id and path, it says {header[:120]!r}"
        )
    twice = [name for name, count in Counter(names).items() if count > 1 and not UNNAMED.fullmatch(name)]
    if twice:
        raise TableError(f"slide table {path} names the column {twice[0][:60]!r} twice in its first line; rename one")


def check_keys(names: Iterable[str], where: str, kind: str) -> None:
    """Refuse a name that is a known one but for capitals, spaces and hyphens: it would be passed over in silence.

    Args:
        names: of the columns, or of a datalist item's keys.
        where: the file and place, for the message.
        kind: "column" or "key".
    """
    for name in names:
        meant = _KNOWN.get(_BETWEEN_WORDS.sub("", name).casefold())
        if meant is not None and name != meant:
            raise TableError(f"{where}: {kind} {name!r}: did you mean {meant}?; rename it")


def check_unique(records: Sequence[SlideRecord], path: Path) -> None:
    """Refuse two slides of one slide_id."""
    first: dict[str, SlideRecord] = {}
    for record in records:
        # Two names that differ in case alone, or in how an accent is written, are one file on Windows and macOS.
        key = unicodedata.normalize("NFC", record.slide_id).casefold()
        other = first.setdefault(key, record)
        if other is not record:
            again = (
                "twice" if other.slide_id == record.slide_id else f"twice, once as {other.slide_id!r} (one file name)"
            )
            raise TableError(
                f"slide table {path} lists slide_id {record.slide_id!r} {again} ({other.path} and {record.path}); "
                "give every slide a name of its own"
            )


def check_spelling(records: Sequence[SlideRecord], path: Path) -> None:
    """Refuse one label or patient in two spellings: it would be two classes, or a patient on both sides of a split."""
    for column in ("label", "patient_id"):
        values = (getattr(record, column) for record in records)
        pair = spelt_twice(value for value in values if value is not None)
        if pair is not None:
            raise TableError(
                f"slide table {path} writes one {column} in two ways, {pair[0]} and {pair[1]}; write it in one "
                "(capitals, spaces and how an accent is stored tell no two apart; a spreadsheet or pandas turns whole "
                "numbers into fractions where a cell is empty)"
            )


def spelt_twice(values: Iterable[str]) -> tuple[str, str] | None:
    """The first two of some names that differ in their spelling alone.

    They are one where they differ in capitals, in how many spaces of which kind lie between words, in how an accent
    is stored, or as 1 and 1.0 do.

    Returns:
        the two as they are told, in quotes, and with what no screen shows written out; None where there are none.
    """
    spelt: dict[str, str] = {}
    for value in values:
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", value).casefold())
        other = spelt.setdefault(_WHOLE_AS_FRACTION.sub(r"\1", " ".join(folded.split())), value)
        if other != value:
            looks_alike = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", value)
            told = ascii if looks_alike else repr
            return told(other), told(value)
    return None


def check_split(records: Sequence[SlideRecord], path: Path) -> None:
    """Refuse a patient on both sides of a split that the table gives."""
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


def warn_of_shared_files(records: Sequence[SlideRecord], path: Path) -> None:
    """Say where slides of different patients are one file: it may fall on both sides of a split."""
    folders: dict[Path, str] = {}
    first: dict[str, SlideRecord] = {}
    shared: list[tuple[SlideRecord, SlideRecord]] = []
    for record in records:
        # Folders are resolved once: a share is asked one thing a slide, not one for each part of its path.
        folder = record.path.parent
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        file = os.path.join(folders[folder], record.path.name)
        file = os.path.realpath(file) if os.path.islink(file) else os.path.normpath(file)
        other = first.setdefault(file, record)
        if other.patient_id != record.patient_id:
            shared.append((other, record))
    if shared:
        one, two = shared[0]
        logger.warning(
            "slide table %s: %d slides are the file of another patient's slide, the first %s of patient %s and %s of "
            "patient %s (%s): one file may fall on both sides of a split; correct the paths or the patients",
            path,
            len(shared),
            one.slide_id,
            one.patient_id,
            two.slide_id,
            two.patient_id,
            two.path,
        )
