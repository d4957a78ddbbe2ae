"""Figures of merit for slide classifiers: from probabilities and labels, without a model in sight."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

__all__ = [
    "accuracy",
    "auc",
    "balanced_accuracy",
    "classification_metrics",
    "confusion_matrix",
    "decisions",
    "f1_score",
    "one_vs_rest",
    "precision_recall_specificity",
    "quadratic_kappa",
    "roc_curve",
    "sensitivity_at_specificity",
    "specificity_at_sensitivity",
]


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores higher than a negative, ties counting half.

    Args:
        labels: (n,) 0 and 1.
        scores: (n,) higher means more likely positive.

    Returns:
        in [0, 1]; NaN when one class is absent.
    """
    labels = np.asarray(labels, dtype=bool)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the ROC curve, from (0, 0) to (1, 1).

    Args:
        labels: (n,) 0 and 1, both present.
        scores: (n,) float.

    Returns:
        false-positive rate, sensitivity, and the threshold of each point ("positive when score >= threshold"; the first
        is infinite).

    Raises:
        ValueError: when one class is absent.
    """
    labels = np.asarray(labels, dtype=bool)
    scores = np.asarray(scores, dtype=np.float64)
    if labels.all() or not labels.any():
        raise ValueError("a ROC curve needs both positives and negatives")
    order = np.argsort(-scores, kind="stable")
    hits, ranked = labels[order], scores[order]
    last_of_tie = np.r_[ranked[1:] != ranked[:-1], True]
    true = np.cumsum(hits)[last_of_tie]
    false = np.cumsum(~hits)[last_of_tie]
    thresholds = np.r_[np.inf, ranked[last_of_tie]]
    return np.r_[0, false] / (~labels).sum(), np.r_[0, true] / labels.sum(), thresholds


def sensitivity_at_specificity(labels: np.ndarray, scores: np.ndarray, specificity: float = 0.95) -> float:
    """Highest sensitivity of a threshold that keeps at least this specificity: a point of the ROC curve.

    The threshold is found on the slides that it is judged on: it says what the scores could do, not what a classifier
    does at a threshold chosen before. ``recall`` and ``specificity`` say that, at the decision.

    Args:
        labels: (n,) 0 and 1.
        scores: (n,) float.
        specificity: in [0, 1].

    Returns:
        in [0, 1], 0 when only "never positive" keeps it; NaN when one class is absent.
    """
    labels = np.asarray(labels, dtype=bool)
    if labels.all() or not labels.any():
        return float("nan")
    false, true, _ = roc_curve(labels, scores)
    return float(true[false <= 1.0 - specificity + 1e-12].max())


def specificity_at_sensitivity(labels: np.ndarray, scores: np.ndarray, sensitivity: float = 0.95) -> float:
    """Highest specificity of a threshold that finds at least this share of the positives: the question of a screening.

    A point of the ROC curve as well; see ``sensitivity_at_specificity``.

    Args:
        labels: (n,) 0 and 1.
        scores: (n,) float.
        sensitivity: in [0, 1].

    Returns:
        in [0, 1]; NaN when one class is absent.
    """
    labels = np.asarray(labels, dtype=bool)
    if labels.all() or not labels.any():
        return float("nan")
    false, true, _ = roc_curve(labels, scores)
    return float(1.0 - false[true >= sensitivity - 1e-12].min())


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """(C, C) counts; row: true class, column: predicted class."""
    matrix = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(matrix, (np.asarray(labels), np.asarray(predicted)), 1)
    return matrix


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Share of right decisions; of right findings for multi-label (n, C)."""
    return float(np.mean(np.asarray(labels) == np.asarray(predicted)))


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall of the classes that occur; for multi-label (n, C) the mean over findings of the two-class one."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.ndim == 2:
        return float(np.mean([balanced_accuracy(labels[:, c], predicted[:, c]) for c in range(labels.shape[1])]))
    return float(np.mean([np.mean(predicted[labels == c] == c) for c in np.unique(labels)]))


def f1_score(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> float:
    """F1 of class 1 when there are two classes, else the mean over classes or findings (0 where undefined)."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.ndim == 2:
        return float(np.mean([_f1(labels[:, c] == 1, predicted[:, c] == 1) for c in range(labels.shape[1])]))
    if n_classes == 2:
        return _f1(labels == 1, predicted == 1)
    return float(np.mean([_f1(labels == c, predicted == c) for c in range(n_classes)]))


def _f1(true: np.ndarray, said: np.ndarray) -> float:
    both = float((true & said).sum())
    total = float(true.sum() + said.sum())
    return 2 * both / total if total else 0.0


def precision_recall_specificity(
    labels: np.ndarray, predicted: np.ndarray, n_classes: int
) -> tuple[float, float, float]:
    """Precision, recall (sensitivity) and specificity of the decisions.

    Of class 1 when there are two classes, else the mean over classes (each against all others) or findings. A figure
    that is undefined, for there is nothing to divide by, is left out of the mean, and NaN where all are.

    Args:
        labels: (n,) classes or (n, C) findings.
        predicted: as ``labels``.
        n_classes: number C.

    Returns:
        three numbers in [0, 1], or NaN.
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.ndim == 2:
        questions = [(labels[:, c] == 1, predicted[:, c] == 1) for c in range(labels.shape[1])]
    else:
        chosen = [1] if n_classes == 2 else range(n_classes)
        questions = [(labels == c, predicted == c) for c in chosen]
    figures = []
    for true, said in questions:
        pairs = (
            ((true & said).sum(), said.sum()),
            ((true & said).sum(), true.sum()),
            ((~true & ~said).sum(), (~true).sum()),
        )
        figures.append([part / whole if whole else np.nan for part, whole in pairs])
    columns = np.array(figures).T
    precision, recall, specificity = (float(np.nanmean(c)) if not np.isnan(c).all() else float("nan") for c in columns)
    return precision, recall, specificity


def quadratic_kappa(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> float:
    """Cohen's kappa with quadratic weights: agreement on ordered grades beyond chance; NaN when it is undefined."""
    observed = confusion_matrix(labels, predicted, n_classes).astype(np.float64)
    grades = np.arange(n_classes)
    cost = (grades[:, None] - grades[None, :]) ** 2
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0)) / observed.sum()
    chance = float((cost * expected).sum())
    return float("nan") if chance == 0 else 1.0 - float((cost * observed).sum()) / chance


def one_vs_rest(labels: np.ndarray, probabilities: np.ndarray, target: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two-class questions behind a prediction, as pairs of (labels 0/1, scores).

    Two classes: one question, is it class 1. ``ordinal``: is the grade above k, for every k. Otherwise one a class.

    Args:
        labels: (n,) classes or (n, C) findings.
        probabilities: (n, C).
        target: "multiclass", "ordinal" or "multilabel".
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    count = probabilities.shape[1]
    if target == "multilabel":
        return [(labels[:, c], probabilities[:, c]) for c in range(count)]
    if target == "ordinal":
        return [((labels > k).astype(int), probabilities[:, k + 1 :].sum(axis=1)) for k in range(count - 1)]
    chosen = [1] if count == 2 else range(count)
    return [((labels == c).astype(int), probabilities[:, c]) for c in chosen]


def decisions(probabilities: np.ndarray, target: str) -> np.ndarray:
    """Decided class (n,), median grade for ``ordinal``, or findings (n, C) of 0 and 1 for ``multilabel``."""
    probabilities = np.asarray(probabilities)
    if target == "multilabel":
        return (probabilities >= 0.5).astype(np.int64)
    if target == "ordinal":
        return (1.0 - np.cumsum(probabilities, axis=1)[:, :-1] > 0.5).sum(axis=1)
    return probabilities.argmax(axis=1)


def classification_metrics(
    labels: np.ndarray, probabilities: np.ndarray, target: str = "multiclass", specificity: float = 0.95
) -> dict[str, float]:
    """All figures at once.

    Args:
        labels: (n,) classes or (n, C) findings.
        probabilities: (n, C).
        target: "multiclass", "ordinal" or "multilabel".
        specificity: for the sensitivity, and the sensitivity for the specificity.

    Returns:
        ``accuracy, balanced_accuracy, auc, recall, precision, specificity, f1``, ``sensitivity_at_95_specificity`` and
        ``specificity_at_95_sensitivity`` (named by the share; points of the ROC curve), for ``ordinal`` also
        ``quadratic_kappa``. AUC and the last two are means over ``one_vs_rest``; NaN where a class is absent.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    predicted = decisions(probabilities, target)
    questions = one_vs_rest(labels, probabilities, target)
    count = probabilities.shape[1]
    precision, recall, true_negatives = precision_recall_specificity(labels, predicted, count)
    result = {
        "accuracy": accuracy(labels, predicted),
        "balanced_accuracy": balanced_accuracy(labels, predicted),
        "auc": float(np.mean([auc(*question) for question in questions])),
        "recall": recall,
        "precision": precision,
        "specificity": true_negatives,
        "f1": f1_score(labels, predicted, count),
        f"sensitivity_at_{round(100 * specificity)}_specificity": float(
            np.mean([sensitivity_at_specificity(*question, specificity=specificity) for question in questions])
        ),
    }
    result[f"specificity_at_{round(100 * specificity)}_sensitivity"] = float(
        np.mean([specificity_at_sensitivity(*question, sensitivity=specificity) for question in questions])
    )
    if target == "ordinal":
        result["quadratic_kappa"] = quadratic_kappa(labels, predicted, count)
    return result
