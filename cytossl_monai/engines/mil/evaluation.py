"""What an evaluation writes: predictions.csv, metrics.json, ROC curve and confusion matrix."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cytossl_monai.data.bags.seen import seen_items
from cytossl_monai.metrics.bootstrap import Interval, bootstrap_intervals
from cytossl_monai.metrics.calibration import brier_score, classwise_calibration_error, expected_calibration_error
from cytossl_monai.metrics.classification import classification_metrics, decisions
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.utils.cells import plain_cell
from cytossl_monai.utils.errors import InputError
from cytossl_monai.utils.files import atomic_path, write_json
from cytossl_monai.visualize.curves_mil import plot_confusion_matrix, plot_reliability, plot_roc

__all__ = ["check_unseen", "prediction_table", "write_evaluation"]

logger = logging.getLogger(__name__)


def check_unseen(
    classifier: MILClassifier, items: Sequence[dict[str, Any]], path: str | os.PathLike[str], allow_seen: bool = False
) -> None:
    """Refuse to judge a classifier on slides, or other slides of patients, that it learned from.

    Slides that it was chosen and calibrated on are judged with a warning. Files of before version 0.2 do not say what
    they have seen.

    Args:
        classifier: loaded from its file.
        items: what it is to be judged on, see ``bag_items``.
        path: of the file, for the message.
        allow_seen: warn of slides that it learned from as well.

    Raises:
        InputError: for slides that it learned from.
    """
    seen = classifier.meta.get("seen")
    learned, chosen = seen_items(items, seen), seen_items(items, seen, "chosen")
    if learned:
        what = (
            f"{path} learned from {len(learned)} of the {len(items)} slides to judge, or from others of their patients "
            f"({learned[0]['slide_id']} is one): figures on them flatter it"
        )
        if not allow_seen:
            closed = " (this method learns from validation slides too)" if classifier.network.closed_form else ""
            raise InputError(
                f"{what}. Train with test_fold or holdout{closed} and give the same here, seed too, or judge other "
                "slides; --allow_seen True judges these all the same"
            )
        logger.warning("%s", what)
    elif chosen:
        logger.warning(
            "%s was chosen and calibrated on %d of the %d slides to judge: figures on them flatter it; for a report "
            "train with test_fold or holdout",
            path,
            len(chosen),
            len(items),
        )


def prediction_table(
    slides: Sequence[str],
    patients: Sequence[str],
    probabilities: np.ndarray,
    classes: Sequence[str],
    target: str = "multiclass",
    labels: np.ndarray | None = None,
) -> pd.DataFrame:
    """One row a slide: ``slide_id, patient_id, [label,] predicted, prob_<class>...``.

    Findings of ``multilabel`` are joined by ``|``, "none" where there is none.
    """

    def names(values: np.ndarray) -> list[str]:
        if values.ndim == 2:
            return ["|".join(c for c, v in zip(classes, row) if v) or "none" for row in values]
        return [classes[int(v)] for v in values]

    columns: dict[str, Any] = {"slide_id": list(slides), "patient_id": list(patients)}
    if labels is not None:
        columns["label"] = names(np.asarray(labels))
    columns["predicted"] = names(decisions(probabilities, target))
    columns |= {f"prob_{name}": probabilities[:, c] for c, name in enumerate(classes)}
    return pd.DataFrame(columns)


def write_evaluation(
    output_dir: str | os.PathLike[str],
    slides: Sequence[str],
    patients: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    target: str = "multiclass",
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Write ``predictions.csv``, ``metrics.json``, ``roc.png``, ``confusion_matrix.png``, ``reliability.png``.

    Args:
        output_dir: where to.
        slides: (n,) slide_ids.
        patients: (n,) patient_ids: the bootstrap draws whole patients.
        labels: (n,) classes or (n, C) findings.
        probabilities: (n, C).
        classes: names of the C classes.
        target: kind of target.
        n_resamples: draws of the bootstrap.
        seed: of the bootstrap.

    Returns:
        the figures of ``classification_metrics`` and ``ece`` (of the top label), ``ece_classwise``, ``brier`` and
        ``prevalence_gap_<class>``, the mean probability of a class less its share, with 95 % intervals.
    """
    folder = Path(output_dir)
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)

    def figures(rows: np.ndarray) -> dict[str, float]:
        y, p = labels[rows], probabilities[rows]
        return {
            **classification_metrics(y, p, target),
            "ece": expected_calibration_error(y, p),
            "ece_classwise": classwise_calibration_error(y, p),
            "brier": brier_score(y, p),
            **_prevalence_gaps(y, p, classes),
        }

    strata = labels if labels.ndim == 1 else labels.any(axis=1).astype(int)
    intervals = bootstrap_intervals(figures, len(labels), patients, strata, n_resamples, seed=seed)
    table = prediction_table(slides, patients, probabilities, classes, target, labels)
    with atomic_path(folder / "predictions.csv") as partial:
        table.map(plain_cell).to_csv(partial, index=False, float_format="%.6f")
    predicted = decisions(probabilities, target)
    plot_confusion_matrix(folder / "confusion_matrix.png", labels, predicted, classes)
    if plot_roc(folder / "roc.png", labels, probabilities, classes, target) is None:
        logger.warning("no ROC curve: the slides hold one class only")
    plot_reliability(folder / "reliability.png", labels, probabilities, classes)
    summary = {
        "n_slides": len(labels),
        "n_patients": len(set(patients)),
        "classes": list(classes),
        "target": target,
        "metrics": {name: interval.as_dict() for name, interval in intervals.items()},
    }
    write_json(folder / "metrics.json", summary)
    for name, interval in intervals.items():
        logger.info("%s: %s", name, interval)
    return intervals


def _prevalence_gaps(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Mean predicted minus observed share of each class; the second of two says the first."""
    truth = labels if labels.ndim == 2 else np.eye(len(classes))[labels]
    gaps = (probabilities - truth).mean(axis=0)
    first = 1 if labels.ndim == 1 and len(classes) == 2 else 0
    return {f"prevalence_gap_{name}": float(gaps[c]) for c, name in enumerate(classes) if c >= first}
