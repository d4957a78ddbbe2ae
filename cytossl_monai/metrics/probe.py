"""Linear probe: how well a linear classifier on frozen features does, cross-validated, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cytossl_monai.metrics.knn import knn_predict

__all__ = ["ProbeResult", "fold_interval", "group_folds", "knn_probe", "linear_probe"]


@dataclass(frozen=True)
class ProbeResult:
    """Balanced accuracy by cross-validation.

    Args:
        mean: mean of the folds.
        low: lower end of the 95 % interval of that mean.
        high: upper end.
        folds: each fold's value.
        predicted: (N,) predicted label of each sample, by the fold that did not see it.
    """

    mean: float
    low: float
    high: float
    folds: tuple[float, ...]
    predicted: np.ndarray


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


def fold_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of folds, by Student's t, cut to [0, 1]."""
    scores = np.asarray(values, dtype=np.float64)
    if len(scores) < 2:
        return float(scores.mean()), float(scores.mean())
    half = float(stats.t.ppf(0.975, len(scores) - 1) * scores.std(ddof=1) / np.sqrt(len(scores)))
    return max(0.0, float(scores.mean()) - half), min(1.0, float(scores.mean()) + half)


def _result(predicted: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> ProbeResult:
    scores = []
    for fold in np.unique(folds):
        held = folds == fold
        scores.append(float(balanced_accuracy_score(labels[held], predicted[held])))
    low, high = fold_interval(scores)
    return ProbeResult(float(np.mean(scores)), low, high, tuple(scores), predicted)


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    strength: float = 1.0,
    max_iter: int = 500,
) -> ProbeResult:
    """Logistic regression with class weights on standardised features, each fold predicted by the others.

    Args:
        features: (N, D).
        labels: (N,) integers.
        folds: (N,) fold of each sample.
        strength: inverse of the L2 penalty (scikit-learn's ``C``), divided by D as penalties add up over features.
        max_iter: of the solver.

    Raises:
        ValueError: when there are fewer than two folds or classes.
    """
    features, labels, folds = np.asarray(features, np.float64), np.asarray(labels), np.asarray(folds)
    if len(np.unique(folds)) < 2 or len(np.unique(labels)) < 2:
        raise ValueError("a linear probe needs at least two folds and two classes")
    predicted = np.empty_like(labels)
    for fold in np.unique(folds):
        held = folds == fold
        model = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=strength / features.shape[1], class_weight="balanced", max_iter=max_iter),
        )
        predicted[held] = model.fit(features[~held], labels[~held]).predict(features[held])
    return _result(predicted, labels, folds)


def knn_probe(
    features: np.ndarray, labels: np.ndarray, folds: np.ndarray, k: int = 20, temperature: float = 0.07
) -> ProbeResult:
    """Weighted kNN with the folds and the interval of ``linear_probe``.

    Args:
        features: (N, D).
        labels: (N,) integers from 0.
        folds: (N,) fold of each sample.
        k: see ``knn_predict``.
        temperature: see ``knn_predict``.
    """
    labels, folds = np.asarray(labels), np.asarray(folds)
    if len(np.unique(folds)) < 2:
        raise ValueError("a probe needs at least two folds")
    bank, known = torch.as_tensor(np.asarray(features), dtype=torch.float32), torch.as_tensor(labels)
    predicted = np.empty_like(labels)
    for fold in np.unique(folds):
        held = torch.as_tensor(folds == fold)
        votes = knn_predict(bank[~held], known[~held], bank[held], int(labels.max()) + 1, k, temperature)
        predicted[held.numpy()] = votes.argmax(1).numpy()
    return _result(predicted, labels, folds)
