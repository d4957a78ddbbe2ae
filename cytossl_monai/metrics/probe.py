"""Probes of frozen features: kNN and a linear classifier, cross-validated, with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from cytossl_monai.metrics.classification import auc, balanced_accuracy
from cytossl_monai.metrics.knn import knn_predict

__all__ = [
    "PENALTY_GRID",
    "FoldFigure",
    "ProbeResult",
    "fold_figure",
    "fold_interval",
    "group_folds",
    "knn_probe",
    "linear_probe",
    "paired_difference",
]

PENALTY_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse L2 penalties (scikit-learn's ``C``) that a linear probe chooses from, the same for features of any width."""


@dataclass(frozen=True)
class FoldFigure:
    """A figure by cross-validation.

    Args:
        mean: mean of the folds.
        low: lower end of the 95 % interval of that mean.
        high: upper end.
        folds: each fold's value.
    """

    mean: float
    low: float
    high: float
    folds: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class ProbeResult:
    """What a probe makes of features.

    Args:
        balanced_accuracy: mean recall of the classes.
        auc: mean over the classes of the area under the ROC curve of one class against the others. It looks at the
            order of the scores alone, so that it is the steadier of the two where classes are rare.
        predicted: (N,) predicted label of each sample, by the fold that did not see it.
        scores: (N, C) scores that the prediction was made from.
        penalties: inverse penalty that each fold chose; empty for kNN.
    """

    balanced_accuracy: FoldFigure
    auc: FoldFigure
    predicted: np.ndarray
    scores: np.ndarray
    penalties: tuple[float, ...] = ()


def group_folds(labels: Sequence[int], groups: Sequence[object] | None, n_folds: int = 5, seed: int = 0) -> np.ndarray:
    """Folds that keep groups together and classes in proportion, as far as both can be had.

    Args:
        labels: (N,) classes.
        groups: (N,) what must not straddle folds; None: every sample for itself.
        n_folds: number of folds.
        seed: of the shuffle.

    Returns:
        (N,) int64 in [0, n_folds).

    Raises:
        ValueError: when there are fewer groups than folds.
    """
    classes = np.asarray(labels)
    keys = np.arange(len(classes)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(np.unique(keys)) < n_folds:
        raise ValueError(f"{n_folds} folds need at least as many groups, got {len(np.unique(keys))}")
    folds = np.empty(len(classes), dtype=np.int64)
    splitter = StratifiedGroupKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    for number, (_, held) in enumerate(splitter.split(np.zeros(len(classes)), classes, keys)):
        folds[held] = number
    return folds


def fold_interval(values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """95 % interval of the mean of k folds, by Student's t with the variance that Nadeau and Bengio correct.

    Any two folds share most of their training data, so that their values are not independent: the variance of the mean
    is taken as ``(1 / k + 1 / (k - 1))`` times that of the folds, in place of ``1 / k`` (Nadeau and Bengio, *Inference
    for the Generalization Error*, Machine Learning 2003: 1 / k plus the ratio of test to training samples).

    Args:
        values: one of each fold; NaN where it is not defined, which is left out.
        bounds: smallest and largest value that the figure can have; the interval is cut to them.
    """
    scores = np.asarray(values, dtype=np.float64)
    scores = scores[np.isfinite(scores)]
    count = len(scores)
    if count < 2:
        mean = float(scores.mean()) if count else float("nan")
        return mean, mean
    spread = float(scores.std(ddof=1)) * np.sqrt(1 / count + 1 / (count - 1))
    half = float(stats.t.ppf(0.975, count - 1)) * float(spread)
    return max(bounds[0], float(scores.mean()) - half), min(bounds[1], float(scores.mean()) + half)


def fold_figure(values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)) -> FoldFigure:
    """Mean and interval of a figure's folds; see ``fold_interval``."""
    finite = [value for value in values if np.isfinite(value)]
    low, high = fold_interval(values, bounds)
    return FoldFigure(float(np.mean(finite)) if finite else float("nan"), low, high, tuple(map(float, values)))


def paired_difference(one: FoldFigure, other: FoldFigure) -> FoldFigure:
    """One figure less another on the same folds; the interval is that of the folds' differences.

    What makes a fold hard is hard for both and drops out, so that it tells more than two intervals side by side.

    Raises:
        ValueError: when the two have not the same number of folds.
    """
    if len(one.folds) != len(other.folds):
        raise ValueError(f"a paired difference needs the same folds, got {len(one.folds)} and {len(other.folds)}")
    return fold_figure([a - b for a, b in zip(one.folds, other.folds)], (-1.0, 1.0))


def _macro_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean one-against-rest AUC of the classes that occur beside others; NaN where none does."""
    values = [auc(labels == c, scores[:, c]) for c in range(scores.shape[1])]
    defined = [value for value in values if np.isfinite(value)]
    return float(np.mean(defined)) if defined else float("nan")


def _result(scores: np.ndarray, labels: np.ndarray, folds: np.ndarray, penalties: Sequence[float] = ()) -> ProbeResult:
    predicted = scores.argmax(axis=1)
    held = [folds == fold for fold in np.unique(folds)]
    return ProbeResult(
        fold_figure([balanced_accuracy(labels[rows], predicted[rows]) for rows in held]),
        fold_figure([_macro_auc(labels[rows], scores[rows]) for rows in held]),
        predicted,
        scores,
        tuple(penalties),
    )


def _check(labels: np.ndarray, folds: np.ndarray) -> None:
    if len(np.unique(folds)) < 2 or len(np.unique(labels)) < 2:
        raise ValueError("a probe needs at least two folds and two classes")


def _path(
    features: np.ndarray, labels: np.ndarray, penalties: Sequence[float], max_iter: int, held: np.ndarray, n: int
) -> list[np.ndarray]:
    """Scores (M, n) of ``held`` by logistic regressions of falling penalty, each begun where the one before ended."""
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(class_weight="balanced", max_iter=max_iter, warm_start=True)
    scores = []
    for penalty in sorted(penalties):
        model.set_params(C=penalty).fit(scaler.transform(features), labels)
        columns = np.zeros((len(held), n))  # a class that the training part lacks scores 0
        columns[:, model.classes_] = model.predict_proba(scaler.transform(held))
        scores.append(columns)
    return scores


def _choose(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    penalties: Sequence[float],
    inner_folds: int,
    max_iter: int,
    n: int,
) -> float:
    """The penalty of the smallest class-weighted log loss on inner folds of the training samples."""
    if len(penalties) == 1:
        return penalties[0]
    known = len(np.unique(groups)) if groups is not None else len(labels)
    inner = group_folds(labels.tolist(), None if groups is None else groups.tolist(), min(inner_folds, known))
    losses = np.zeros(len(penalties))
    for fold in np.unique(inner):
        held = inner == fold
        if len(np.unique(labels[~held])) < 2:
            continue
        weight = compute_sample_weight("balanced", labels[held])
        for place, scores in enumerate(_path(features[~held], labels[~held], penalties, max_iter, features[held], n)):
            clipped = np.clip(scores, 1e-7, None)
            losses[place] += log_loss(
                labels[held], clipped / clipped.sum(1, keepdims=True), sample_weight=weight, labels=np.arange(n)
            )
    return sorted(penalties)[int(losses.argmin())]


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    groups: Sequence[object] | None = None,
    penalties: Sequence[float] = PENALTY_GRID,
    inner_folds: int = 3,
    max_iter: int = 200,
) -> ProbeResult:
    """Logistic regression with class weights on standardised features, each fold predicted by the others.

    The penalty is chosen for each fold on inner folds of the samples that it trains on, from one grid for all
    features: a fixed one, or one that depends on their width, would favour some widths over others.

    Args:
        features: (N, D).
        labels: (N,) integers from 0.
        folds: (N,) fold of each sample.
        groups: (N,) what must not straddle the inner folds (patient, slide, frame); None: every sample for itself.
        penalties: inverse L2 penalties to choose from; one only: no choice.
        inner_folds: folds that it is chosen on.
        max_iter: of the solver.

    Raises:
        ValueError: when there are fewer than two folds or classes, or no penalty.
    """
    features, labels, folds = np.asarray(features, np.float64), np.asarray(labels), np.asarray(folds)
    _check(labels, folds)
    if not len(penalties):
        raise ValueError("a linear probe needs at least one penalty to choose from")
    owners = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    n = int(labels.max()) + 1
    scores = np.zeros((len(labels), n))
    chosen = []
    for fold in np.unique(folds):
        held = folds == fold
        inside = None if owners is None else owners[~held]
        penalty = _choose(features[~held], labels[~held], inside, penalties, inner_folds, max_iter, n)
        # The whole path again, down to the chosen one: a warm start is quicker than a cold one and ends alike.
        path = [value for value in penalties if value <= penalty]
        scores[held] = _path(features[~held], labels[~held], path, max_iter, features[held], n)[-1]
        chosen.append(penalty)
    return _result(scores, labels, folds, chosen)


def knn_probe(
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    class_weighted: bool = True,
) -> ProbeResult:
    """Weighted kNN, each fold classified by the others, with the figures of ``linear_probe``.

    Args:
        features: (N, D).
        labels: (N,) integers from 0.
        folds: (N,) fold of each sample; what belongs together (a patient) is in one fold.
        k: see ``knn_predict``.
        temperature: see ``knn_predict``.
        class_weighted: see ``knn_predict``; balanced accuracy, by which it is judged, asks for it.

    Raises:
        ValueError: when there are fewer than two folds or classes.
    """
    labels, folds = np.asarray(labels), np.asarray(folds)
    _check(labels, folds)
    bank, known = torch.as_tensor(np.asarray(features), dtype=torch.float32), torch.as_tensor(labels)
    n = int(labels.max()) + 1
    scores = np.zeros((len(labels), n))
    for fold in np.unique(folds):
        held = torch.as_tensor(folds == fold)
        votes = knn_predict(bank[~held], known[~held], bank[held], n, k, temperature, class_weighted=class_weighted)
        scores[held.numpy()] = votes.numpy()
    return _result(scores, labels, folds)
