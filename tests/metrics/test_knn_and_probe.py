"""kNN and linear probe against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from cytossl_monai.metrics.knn import balanced_accuracy, knn_cross_validate, knn_predict
from cytossl_monai.metrics.probe import fold_interval, group_folds, knn_probe, linear_probe


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Three classes of unequal size that overlap, in 6 dimensions."""
    rng = np.random.default_rng(3)
    labels = rng.permutation(np.repeat([0, 1, 2], [70, 40, 20]))
    centres = rng.normal(size=(3, 6))
    return (centres[labels] + rng.normal(size=(len(labels), 6))).astype(np.float32), labels


def weighted_knn(temperature: float, k: int) -> KNeighborsClassifier:
    """On the unit sphere the squared distance is 2 - 2 cosine."""
    return KNeighborsClassifier(
        k, weights=lambda distance: np.exp((1 - distance**2 / 2) / temperature), algorithm="brute"
    )


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (20, 0.5)])
def test_votes_are_those_of_scikit_learn(blobs: tuple, k: int, temperature: float) -> None:
    features, labels = blobs
    bank, queries = features[:90], features[90:]
    reference = weighted_knn(temperature, k).fit(normalize(bank), labels[:90])
    found = knn_predict(
        torch.tensor(bank), torch.tensor(labels[:90]), torch.tensor(queries), 3, k, temperature, chunk=11
    )
    np.testing.assert_allclose(found.numpy(), reference.predict_proba(normalize(queries)), atol=1e-4)
    np.testing.assert_allclose(found.sum(1).numpy(), 1, atol=1e-6)


def test_more_neighbours_than_there_are(blobs: tuple) -> None:
    features, labels = (torch.tensor(part[:12]) for part in blobs)
    assert torch.equal(knn_predict(features, labels, features, 3, 500), knn_predict(features, labels, features, 3, 12))
    assert knn_predict(features, labels, features[:0], 3).shape == (0, 3)


def test_cross_validation_predicts_each_fold_by_the_others(blobs: tuple) -> None:
    features, labels = blobs
    folds = np.arange(len(labels)) % 4
    predicted = np.empty_like(labels)
    for fold in range(4):
        held = folds == fold
        model = weighted_knn(0.07, 9).fit(normalize(features[~held]), labels[~held])
        predicted[held] = model.predict(normalize(features[held]))
    scores = [balanced_accuracy_score(labels[folds == f], predicted[folds == f]) for f in range(4)]
    found = knn_cross_validate(torch.tensor(features), torch.tensor(labels), folds.tolist(), k=9)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found["accuracy"] == pytest.approx((labels == predicted).mean())
    assert found["fold_std"] == pytest.approx(np.std(scores, ddof=1))
    probe = knn_probe(features, labels, folds, k=9)
    assert probe.folds == pytest.approx(tuple(scores))
    assert (probe.predicted == predicted).all()


def test_balanced_accuracy_ignores_classes_that_do_not_occur() -> None:
    labels, predicted = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 2, 2, 0])
    expected = balanced_accuracy_score(labels.numpy(), predicted.numpy())
    assert balanced_accuracy(predicted, labels, 5) == pytest.approx(expected)


def test_linear_probe_is_logistic_regression_on_standardised_features(blobs: tuple) -> None:
    features, labels = blobs
    folds = group_folds(labels.tolist(), None, 5, seed=1)
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / features.shape[1], class_weight="balanced", max_iter=500)
    )
    split = [(np.flatnonzero(folds != f), np.flatnonzero(folds == f)) for f in range(5)]
    expected = cross_val_predict(model, features.astype(np.float64), labels, cv=split)
    found = linear_probe(features, labels, folds)
    assert (found.predicted == expected).all()
    scores = [balanced_accuracy_score(labels[folds == f], expected[folds == f]) for f in range(5)]
    assert found.mean == pytest.approx(np.mean(scores))
    assert (found.low, found.high) == pytest.approx(fold_interval(scores))
    # The scale of a feature says nothing.
    assert linear_probe(features * [1, 1000, 1, 0.001, 1, 1], labels, folds).folds == pytest.approx(found.folds)


def test_interval_of_folds_is_students() -> None:
    scores = [0.5, 0.62, 0.58, 0.55, 0.7]
    expected = stats.t.interval(0.95, 4, loc=np.mean(scores), scale=stats.sem(scores))
    assert fold_interval(scores) == pytest.approx(expected)
    assert fold_interval([0.4]) == (0.4, 0.4)
    assert fold_interval([1.0, 1.0, 0.9]) == (pytest.approx(0.966667 - 0.143422, abs=1e-5), 1.0)


def test_folds_keep_groups_together_and_classes_in_proportion() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 400)
    labels = (rng.random(400) < 0.3).astype(int)
    folds = group_folds(labels.tolist(), groups.tolist(), 5)
    assert all(len(set(folds[groups == group])) == 1 for group in range(40))
    assert all(abs(labels[folds == fold].mean() - labels.mean()) < 0.1 for fold in range(5))
    assert (group_folds(labels.tolist(), groups.tolist(), 5) == folds).all()
    with pytest.raises(ValueError, match="at least as many groups"):
        group_folds([0, 1, 0, 1], ["a", "a", "b", "b"], 3)


def test_bad_input_is_named(blobs: tuple) -> None:
    features, labels = (torch.tensor(part) for part in blobs)
    with pytest.raises(ValueError, match="labels"):
        knn_predict(features, labels[:-1], features, 3)
    with pytest.raises(ValueError, match="k must be at least 1"):
        knn_predict(features, labels, features, 3, k=0)
    with pytest.raises(ValueError, match="two folds"):
        knn_cross_validate(features, labels, [0] * len(labels))
    with pytest.raises(ValueError, match="two folds and two classes"):
        linear_probe(features.numpy(), np.zeros(len(labels), int), np.arange(len(labels)) % 2)
