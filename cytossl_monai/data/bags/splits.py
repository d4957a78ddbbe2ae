"""Splits that keep every slide of a patient on one side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.utils.errors import TableError

__all__ = [
    "assign_folds",
    "check_patients",
    "check_training_labels",
    "fold_numbers",
    "hold_out",
    "split_items",
    "without_test",
]

logger = logging.getLogger(__name__)


def assign_folds(
    labels: Sequence[int] | np.ndarray, patients: Sequence[str], n_folds: int, seed: int = 0
) -> np.ndarray:
    """Deal patients to folds so that every fold has about the same share of every class.

    Patients are dealt one at a time, those with the rarest class and the most slides first (at random among equals),
    each to the fold that lacks its class most; slides of one patient stay together.

    Args:
        labels: (n,) class of every slide; for multi-label targets any integer that names the combination.
        patients: (n,) whose slide it is.
        n_folds: number of folds k.
        seed: same seed, same folds.

    Returns:
        int64 (n,) fold of every slide, in [0, k).

    Raises:
        TableError: when there are fewer patients than folds, or a class has fewer patients than folds, so that a fold
            would be without it.
        ValueError: when k < 2 or the lengths differ.
    """
    labels = np.asarray(labels, dtype=np.int64)
    if n_folds < 2:
        raise ValueError(f"n_folds must be at least 2, got {n_folds}")
    if len(labels) != len(patients):
        raise ValueError(f"{len(labels)} labels but {len(patients)} patients")
    names = sorted(set(patients))
    if n_folds > len(names):
        raise TableError(f"{n_folds} folds need at least {n_folds} patients, the table has {len(names)}; ask for fewer")
    classes, label_of = np.unique(labels, return_inverse=True)
    number = {name: i for i, name in enumerate(names)}
    owner = np.array([number[p] for p in patients])
    counts = np.zeros((len(names), len(classes)), dtype=np.int64)
    np.add.at(counts, (owner, label_of), 1)
    per_class = (counts > 0).sum(axis=0)
    scarce = [(int(c), int(n)) for c, n in zip(classes, per_class) if n < n_folds]
    if scarce and len(classes) > 1:
        told = ", ".join(f"class {c} has {n}" for c, n in scarce)
        raise TableError(
            f"{n_folds} folds need {n_folds} patients of every class, but {told}: a fold would be without it; ask for "
            "fewer folds or merge rare classes"
        )
    rng = np.random.default_rng(seed)
    rarest = np.array([per_class[np.flatnonzero(row)].min() for row in counts])
    order = np.lexsort((rng.permutation(len(names)), -counts.sum(axis=1), rarest))
    fold_of = np.empty(len(names), dtype=np.int64)
    held = np.zeros((n_folds, len(classes)), dtype=np.int64)
    for patient in order:
        row = counts[patient]
        # Lack of this patient's classes first, then of slides in all, then by chance.
        burden = held[:, row > 0].sum(axis=1)
        best = np.lexsort((rng.random(n_folds), held.sum(axis=1), burden))[0]
        fold_of[patient] = best
        held[best] += row
    return fold_of[owner]


def hold_out(labels: Sequence[int] | np.ndarray, patients: Sequence[str], share: float, seed: int = 0) -> np.ndarray:
    """Draw the patients of a test set, the same share of every class.

    A patient counts for the rarest class of its slides; of every class at least one patient stays on either side.

    Args:
        labels: (n,) class of every slide; for multi-label targets any integer that names the combination.
        patients: (n,) whose slide it is.
        share: of the patients to hold out, in (0, 1).
        seed: same seed, same patients.

    Returns:
        bool (n,), True on the slides that are held out.

    Raises:
        TableError: when a class has a single patient, so that one side would be without it.
        ValueError: for a share outside (0, 1).
    """
    labels = np.asarray(labels, dtype=np.int64)
    if not 0.0 < share < 1.0:
        raise ValueError(f"holdout is the share of the patients to hold out, in (0, 1); got {share}")
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    classes, label_of = np.unique(labels, return_inverse=True)
    has = np.zeros((len(names), len(classes)), dtype=bool)
    has[owner, label_of] = True
    rarity = np.where(has, has.sum(axis=0), len(names) + 1)
    stratum = rarity.argmin(axis=1)
    rng = np.random.default_rng(seed)
    held = np.zeros(len(names), dtype=bool)
    for number, name in enumerate(classes):
        members = np.flatnonzero(stratum == number)
        if len(members) == 1 and has[:, number].sum() == 1:
            raise TableError(
                f"class {name} has one patient: a hold-out would leave one side without it; merge rare classes, or add "
                "patients"
            )
        if len(members) > 1:
            count = min(max(1, round(share * len(members))), len(members) - 1)
            held[rng.choice(members, size=count, replace=False)] = True
    return held[owner]


def check_patients(patients: Sequence[str], sides: Sequence[object], what: str = "split") -> None:
    """Refuse a split that has a patient on both sides.

    Args:
        patients: (n,) whose slide it is.
        sides: (n,) fold or side of every slide; None counts as unassigned and is skipped.
        what: name of the split, for the message.

    Raises:
        TableError: naming the patient and the sides.
    """
    seen: dict[str, object] = {}
    for patient, side in zip(patients, sides, strict=True):
        if side is None:
            continue
        if seen.setdefault(patient, side) != side:
            raise TableError(
                f"patient {patient} is on both sides of the {what}: {seen[patient]} and {side}; put all slides of a "
                "patient on one side"
            )


def check_training_labels(labels: np.ndarray, classes: Sequence[str], where: str) -> None:
    """Refuse a set of slides that lacks a class (or, for multi-label (n, C), has a finding in none or all).

    Args:
        labels: (n,) class numbers or (n, C) of 0 and 1.
        classes: the classes.
        where: which set it is, for the message: "training slides of fold 2".

    Raises:
        TableError: naming what is missing.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2:
        share = labels.mean(axis=0)
        bad = [name for name, s in zip(classes, share) if s in (0.0, 1.0)]
        if bad:
            raise TableError(
                f"{where}: {', '.join(bad)} is present in none or in all {len(labels)} slides; choose another split"
            )
        return
    found = set(labels.tolist())
    missing = [name for i, name in enumerate(classes) if i not in found]
    if missing:
        alone = "only one class, " if len(found) == 1 else ""
        raise TableError(
            f"{where}: {alone}no slide of {', '.join(missing)} among {len(labels)}; choose another split or fewer folds"
        )


_SIDES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def split_items(
    items: Sequence[dict[str, Any]],
    n_folds: int = 5,
    fold: int = 0,
    test_fold: int | None = None,
    seed: int = 0,
    holdout: float | None = None,
    one_class: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Training, validation and test items, patient-wise.

    The table's ``split`` (train, val, test) holds where it is given; without a ``val`` in it, validation slides are
    taken from the training ones by folds. Else ``holdout`` draws the test patients and the folds of the others say
    which of them validate. Else the table's ``fold`` counts, else ``assign_folds`` draws.

    Args:
        items: items of ``data.bags.items.bag_items``.
        n_folds: number of folds to draw; ignored where the table has folds.
        fold: the validation fold.
        test_fold: a fold kept out of training and validation; None: none.
        seed: for the draw.
        holdout: share of the patients that is drawn as a test set, 0.3 in the paper; None: none. Not together with
            ``test_fold``.
        one_class: training slides need hold the first class alone (one-class detection).

    Returns:
        lists under ``train``, ``val`` and ``test`` (empty when there is none).

    Raises:
        TableError: when a patient is on two sides, a side lacks a class, or the split is incomplete or unknown.
        ValueError: when ``fold`` or ``test_fold`` is no fold, both are the same, or test slides are named twice.
    """
    patients = [item["patient_id"] for item in items]
    given = [None if item.get("split") is None else str(item["split"]).strip().lower() for item in items]
    sides: list[str | None]
    if any(given):
        unknown = [f"{i['slide_id']}: {g!r}" for i, g in zip(items, given) if g not in _SIDES]
        if unknown:
            raise TableError(f"column split must say train, val or test for every slide; not so for {unknown[0]}")
        for name, value in (("test_fold", test_fold), ("holdout", holdout)):
            if value is not None:
                raise ValueError(
                    f"the slide table says train, val or test of each slide, and {name} {value} names test slides too: "
                    f"set {name} to null, or leave split out of the table"
                )
        sides = [_SIDES[str(g)] for g in given]
        check_patients(patients, sides, "split")
        if "val" not in sides:
            rest = [i for i, side in enumerate(sides) if side == "train"]
            inner = split_items(
                [{**items[i], "split": None} for i in rest], n_folds, fold, None, seed, one_class=one_class
            )
            held = {item["slide_id"] for item in inner["val"]}
            sides = ["val" if item["slide_id"] in held else side for item, side in zip(items, sides)]
    elif holdout is not None:
        if test_fold is not None:
            raise ValueError(
                f"holdout {holdout} and test_fold {test_fold} both name test slides; set one of them to null"
            )
        held_out = hold_out(_classes(items), patients, holdout, seed)
        others = [{**item, "fold": None} for item, out in zip(items, held_out) if not out]
        inner = split_items(others, n_folds, fold, None, seed, None, one_class)
        validating = {item["slide_id"] for item in inner["val"]}
        sides = [
            "test" if out else "val" if item["slide_id"] in validating else "train"
            for item, out in zip(items, held_out)
        ]
    else:
        folds = fold_numbers(items, n_folds, seed)
        known = sorted(set(folds.tolist()))
        for name, value in (("fold", fold), ("test_fold", test_fold)):
            if value is not None and value not in known:
                raise ValueError(f"{name} is {value}, the folds are {known}")
        if fold == test_fold:
            raise ValueError(f"fold and test_fold are both {fold}: validation and test need a fold each")
        check_patients(patients, folds.tolist(), "fold")
        sides = ["test" if f == test_fold else "val" if f == fold else "train" for f in folds.tolist()]
    result = {name: [item for item, s in zip(items, sides) if s == name] for name in ("train", "val", "test")}
    for name in ("train", "val"):
        if not result[name]:
            raise TableError(f"the split leaves no slide for {name}; choose another fold or split")
        labels = np.array([item["label"] for item in result[name]])
        if not one_class:
            check_training_labels(labels, items[0]["classes"], f"{name} slides")
        elif not (labels == 0).any():
            raise TableError(
                f"{name} slides: one-class detection learns from {items[0]['classes'][0]} slides, and there is none; "
                "name the negative class first (classes), or choose another split"
            )
    return result


def without_test(records: Sequence[SlideRecord]) -> list[SlideRecord]:
    """The slides that the table does not keep for a test by its ``split``: what folds and draws may use.

    Other words of the split, such as a datalist's section "training", do not matter to them.
    """
    kept = [r for r in records if _SIDES.get(str(r.extra.get("split") or "").strip().lower()) != "test"]
    if len(kept) < len(records):
        logger.info("%d slides that the table keeps for a test are left out", len(records) - len(kept))
    return kept


def fold_numbers(items: Sequence[dict[str, Any]], n_folds: int, seed: int = 0) -> np.ndarray:
    """Fold of every item: the table's where every slide has one, else drawn by ``assign_folds``.

    Raises:
        TableError: when only some slides have a fold, or see ``assign_folds``.
    """
    given = [item.get("fold") for item in items]
    if all(f is not None for f in given):
        return np.array(given, dtype=np.int64)
    if any(f is not None for f in given):
        bare = next(item["slide_id"] for item, f in zip(items, given) if f is None)
        raise TableError(f"some slides have a fold, {bare} has none; fill the column fold or leave it empty")
    labels = _classes(items)
    if np.ndim(items[0]["label"]) == 1:
        _, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
        labels = np.where(counts[labels] >= n_folds, labels, -1)
        labels = np.zeros_like(labels) if len(set(labels.tolist())) == 1 else labels
        labels = np.where(np.isin(labels, [-1]) & (np.sum(labels == -1) < n_folds), labels.max(), labels)
    return assign_folds(labels, [item["patient_id"] for item in items], n_folds, seed)


def _classes(items: Sequence[dict[str, Any]]) -> np.ndarray:
    """(n,) class of every item; of several findings the rarest, 0 where there is none."""
    labels = np.array([item["label"] for item in items])
    if labels.ndim == 2:
        # Combinations of findings are too rare to deal by; slides are dealt by their rarest finding.
        rarity = np.where(labels.astype(bool), labels.sum(axis=0), len(labels) + 1)
        labels = np.where(labels.any(axis=1), rarity.argmin(axis=1) + 1, 0)
    return labels
