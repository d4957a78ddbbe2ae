"""Bags as items: slides of a table joined with their feature files, and their targets as numbers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cytossl_monai.data.bags.features import read_feature_attrs
from cytossl_monai.data.slide_table import SlideRecord, encode_labels, known_negative, read_slide_table
from cytossl_monai.data.table_checks import spelt_twice
from cytossl_monai.utils.errors import FeatureError, TableError

__all__ = ["Item", "bag_encoder", "bag_items", "encode_targets"]

logger = logging.getLogger(__name__)

Item = dict[str, Any]


def encode_targets(
    records: Sequence[SlideRecord], target: str = "multiclass", classes: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Labels as numbers.

    Args:
        records: slides with labels. ``multilabel``: findings joined by ``|`` or ``;`` ("candida|hsil"), or "none".
        target: "multiclass", "ordinal" or "multilabel".
        classes: the classes; None takes those that occur, sorted, the negative one first where its name
            says so (see ``encode_labels``). ``ordinal`` needs them, lowest grade first.

    Returns:
        int64 (n,), or for ``multilabel`` (n, C) of 0 and 1; and the classes.

    Raises:
        TableError: when a slide has no label, one that is not among ``classes``, or all have the same.
        ValueError: when ``ordinal`` is asked for without ``classes``.
    """
    if target == "ordinal" and classes is None:
        raise ValueError("an ordinal target needs classes, lowest grade first: their order is not in the table")
    if target != "multilabel":
        labels, names = encode_labels(records, classes)
        if len(names) < 2:
            raise TableError(f"all slides have the label {names[0]!r}; a classifier needs at least two classes")
        return labels, names
    bare = [r.slide_id for r in records if r.label is None]
    if bare:
        raise TableError(f"slide {bare[0]} has no label; write 'none' where there is no finding")
    found = [
        [part.strip() for part in str(r.label).replace(";", "|").split("|") if part.strip() not in ("", "none")]
        for r in records
    ]
    pair = spelt_twice(name for row in found for name in row)
    if pair is not None:
        raise TableError(f"one finding is written in two ways, {pair[0]} and {pair[1]}; write it in one")
    names = [str(c) for c in classes] if classes is not None else sorted({name for row in found for name in row})
    if not names:
        raise TableError("no slide has a finding; a classifier needs some")
    number = {name: i for i, name in enumerate(names)}
    labels = np.zeros((len(records), len(names)), dtype=np.int64)
    for i, (record, row) in enumerate(zip(records, found)):
        for name in row:
            if name not in number:
                raise TableError(f"slide {record.slide_id} has the finding {name!r}, which is none of {names}")
            labels[i, number[name]] = 1
    return labels, names


def bag_items(
    slides: str | os.PathLike[str] | Sequence[SlideRecord],
    features_dir: str | os.PathLike[str],
    target: str = "multiclass",
    classes: Sequence[str] | None = None,
    labelled: bool = True,
) -> list[Item]:
    """One item a slide that has features: what ``BagDataset`` takes.

    Slides without a feature file (their slide could not be read, or was empty) are left out with a warning.

    Args:
        slides: slide table, or its records.
        features_dir: folder with ``<slide_id>.h5``.
        target: kind of label, see ``encode_targets``.
        classes: the classes, see ``encode_targets``.
        labelled: False: labels are not needed and not looked at.

    Returns:
        dicts of ``slide_id, patient_id, features`` (path of the file), ``fold``, ``split``, and with ``labelled`` also
        ``label`` (number, or array of 0 and 1 for ``multilabel``), ``label_name`` and ``classes``.

    Raises:
        TableError: see ``encode_targets``.
        FeatureError: when no slide has features.
    """
    records = read_slide_table(slides) if isinstance(slides, (str, os.PathLike)) else list(slides)
    folder = Path(features_dir)
    paths = {r.slide_id: folder / f"{r.slide_id}.h5" for r in records}
    missing = [r.slide_id for r in records if not paths[r.slide_id].is_file()]
    if len(missing) == len(records):
        raise FeatureError(f"none of the {len(records)} slides has a feature file in {folder}; embed the slides first")
    if missing:
        logger.warning("%d slides without features in %s are left out: %s", len(missing), folder, ", ".join(missing))
    records = [r for r in records if paths[r.slide_id].is_file()]
    items: list[Item] = [
        {
            "slide_id": r.slide_id,
            "patient_id": r.patient_id,
            "features": str(paths[r.slide_id]),
            "fold": r.fold,
            "split": r.extra.get("split") or None,
        }
        for r in records
    ]
    if labelled:
        labels, names = encode_targets(records, target, classes)
        if classes is None and target == "multiclass" and len(names) == 2 and known_negative(names) != names[0]:
            logger.warning(
                "which of the classes %s and %s is the negative one is not known; %s is taken for it: else say "
                "--classes \"['%s','%s']\"",
                *names,
                names[0],
                names[1],
                names[0],
            )
        for item, record, label in zip(items, records, labels):
            item.update(label=label if label.ndim else int(label), label_name=record.label, classes=names)
    return items


def bag_encoder(items: Sequence[Item]) -> dict[str, Any]:
    """The encoder that made the features of all items.

    Returns:
        ``hash`` and ``scales`` (None when no file says; 2: tile and centre side by side), ``name`` and ``dim``.

    Raises:
        FeatureError: when two files come from different encoders or differ in width.
    """
    found: dict[str, Any] = {}
    first = ""
    for item in items:
        attrs = read_feature_attrs(item["features"])
        mine = {"hash": attrs.get("encoder"), "name": attrs.get("encoder_name"), "dim": int(attrs["shape"][1])}
        mine["scales"] = None if attrs.get("scales") is None else int(attrs["scales"])
        if not found:
            found, first = mine, item["features"]
        elif mine["dim"] != found["dim"] or mine["hash"] != found["hash"]:
            raise FeatureError(
                f"feature file {item['features']} was made by the encoder {mine['hash'] or '(unknown)'} "
                f"({mine['dim']} features), but {first} by {found['hash'] or '(unknown)'} ({found['dim']} features); "
                "embed all slides with one encoder"
            )
    if not found:
        raise FeatureError("no feature files to train on")
    return found
