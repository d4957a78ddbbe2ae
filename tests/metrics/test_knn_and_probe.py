"""kNN and linear probe against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from cytossl_monai.metrics.knn import knn_predict
from cytossl_monai.metrics.probe import (
    PENALTY_GRID,
    fold_figure,
    fold_interval,
    group_folds,
    knn_probe,
    linear_probe,
    paired_difference,
)


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
    scores = np.zeros((len(labels), 3))
    for fold in range(4):
        held = folds == fold
        model = weighted_knn(0.07, 9).fit(normalize(features[~held]), labels[~held])
        scores[held] = model.predict_proba(normalize(features[held]))
    predicted = scores.argmax(1)
    accuracy = [balanced_accuracy_score(labels[folds == f], predicted[folds == f]) for f in range(4)]
    area = [roc_auc_score(labels[folds == f], scores[folds == f], multi_class="ovr", average="macro") for f in range(4)]
    probe = knn_probe(features, labels, folds, k=9, class_weighted=False)
    assert probe.balanced_accuracy.folds == pytest.approx(tuple(accuracy))
    assert probe.auc.folds == pytest.approx(tuple(area), abs=1e-6)
    assert (probe.predicted == predicted).all()


def test_weighted_votes_are_those_of_a_bank_in_balance() -> None:
    """Copies of the rare class's samples, as many as balance asks for, vote as its weighted ones do."""
    rng = np.random.default_rng(5)
    bank = torch.tensor(rng.normal(size=(40, 4)).astype(np.float32))
    labels = torch.tensor([0] * 30 + [1] * 10)
    queries = torch.tensor(rng.normal(size=(25, 4)).astype(np.float32))
    copied = torch.cat([bank, bank[30:], bank[30:]]), torch.cat([labels, labels[30:], labels[30:]])
    balanced = knn_predict(copied[0], copied[1], queries, 2, k=60)
    weighted = knn_predict(bank, labels, queries, 2, k=40, class_weighted=True)
    torch.testing.assert_close(weighted, balanced)


def test_random_votes_of_a_skewed_set_are_not_all_for_the_large_class() -> None:
    """With 76 % of one class votes without weights hardly name another, whatever the features say."""
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat([0, 1, 2, 3], [760, 120, 80, 40]))
    features = (rng.normal(size=(4, 16))[labels] * 0.5 + rng.normal(size=(len(labels), 16))).astype(np.float32)
    folds = group_folds(labels.tolist(), None, 5)
    plain = knn_probe(features, labels, folds, class_weighted=False)
    weighted = knn_probe(features, labels, folds)
    assert weighted.balanced_accuracy.mean > plain.balanced_accuracy.mean + 0.05


@pytest.fixture(scope="module")
def grouped() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two classes; samples of a group share a shift that says nothing of other groups."""
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(24), 8)
    labels = rng.integers(0, 2, 24)[groups]
    own = rng.normal(size=(24, 12))[groups]
    return rng.normal(size=(2, 12))[labels] * 0.4 + own + 0.2 * rng.normal(size=(192, 12)), labels, groups


def test_linear_probe_is_logistic_regression_on_standardised_features(blobs: tuple) -> None:
    features, labels = blobs
    folds = group_folds(labels.tolist(), None, 5, seed=1)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=500))
    split = [(np.flatnonzero(folds != f), np.flatnonzero(folds == f)) for f in range(5)]
    expected = cross_val_predict(model, features.astype(np.float64), labels, cv=split)
    found = linear_probe(features, labels, folds, penalties=[0.1])
    assert (found.predicted == expected).all()
    scores = [balanced_accuracy_score(labels[folds == f], expected[folds == f]) for f in range(5)]
    assert found.balanced_accuracy.mean == pytest.approx(np.mean(scores))
    figure = found.balanced_accuracy
    assert (figure.low, figure.high) == pytest.approx(fold_interval(scores))
    # The scale of a feature says nothing.
    scaled = linear_probe(features * [1, 1000, 1, 0.001, 1, 1], labels, folds, penalties=[0.1])
    assert scaled.balanced_accuracy.folds == pytest.approx(figure.folds)


def test_the_penalty_is_chosen_inside_by_groups(grouped: tuple) -> None:
    """Against a naive loop over inner folds; inner folds that cut groups would choose a weaker penalty."""
    features, labels, groups = grouped
    folds = group_folds(labels.tolist(), groups.tolist(), 4)
    found = linear_probe(features, labels, folds, groups.tolist())
    for fold, chosen in zip(range(4), found.penalties):
        held = folds == fold
        x, y, own = features[~held], labels[~held], groups[~held]
        inner = group_folds(y.tolist(), own.tolist(), 3)
        losses = []
        for penalty in PENALTY_GRID:
            loss = 0.0
            for part in range(3):
                model = make_pipeline(
                    StandardScaler(), LogisticRegression(C=penalty, class_weight="balanced", max_iter=1000)
                ).fit(x[inner != part], y[inner != part])
                weight = (len(y[inner == part]) / (2 * np.bincount(y[inner == part])))[y[inner == part]]
                loss += log_loss(y[inner == part], model.predict_proba(x[inner == part]), sample_weight=weight)
            losses.append(loss)
        assert chosen == PENALTY_GRID[int(np.argmin(losses))]
    loose = linear_probe(features, labels, folds)
    assert np.mean(np.log(loose.penalties)) > np.mean(np.log(found.penalties))


def test_interval_of_folds_is_students_with_the_correction_of_nadeau_and_bengio() -> None:
    scores = [0.5, 0.62, 0.58, 0.55, 0.7]
    scale = np.std(scores, ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert fold_interval(scores) == pytest.approx(stats.t.interval(0.95, 4, loc=np.mean(scores), scale=scale))
    assert fold_interval([0.4]) == (0.4, 0.4)
    assert fold_interval([1.0, 1.0, 0.9])[1] == 1.0
    assert fold_interval([*scores, float("nan")]) == fold_interval(scores)


def test_a_paired_difference_leaves_out_what_is_hard_for_both() -> None:
    hard = np.array([0.0, 0.2, -0.1, 0.15, -0.25])
    one, other = fold_figure(0.5 + hard + 0.02), fold_figure(0.5 + hard)
    gain = paired_difference(one, other)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.02, 0.02, 0.02))
    assert one.low < other.mean  # side by side the intervals would not tell them apart
    with pytest.raises(ValueError, match="the same folds, got 5 and 2"):
        paired_difference(one, fold_figure([0.1, 0.2]))


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
        knn_probe(features.numpy(), labels.numpy(), np.zeros(len(labels), int))
    with pytest.raises(ValueError, match="two folds and two classes"):
        linear_probe(features.numpy(), np.zeros(len(labels), int), np.arange(len(labels)) % 2)
