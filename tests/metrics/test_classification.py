import numpy as np
import pytest
import sklearn.metrics as sk
from sklearn.metrics import cohen_kappa_score

from cytossl_monai.metrics.classification import (
    auc,
    classification_metrics,
    quadratic_kappa,
    sensitivity_at_specificity,
)


def draw(seed, classes=3, n=80):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    p = rng.dirichlet(np.ones(classes), n) + 0.3 * np.eye(classes)[labels]
    return labels, np.round(p / p.sum(1, keepdims=True), 2)  # rounding makes ties


@pytest.mark.parametrize("seed", range(4))
def test_binary_against_scikit_learn(seed):
    y, p = draw(seed, 2)
    got, said = classification_metrics(y, p), p.argmax(1)
    assert got["auc"] == pytest.approx(sk.roc_auc_score(y, p[:, 1]))
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, said))
    assert got["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, said))
    assert got["f1"] == pytest.approx(sk.f1_score(y, said))
    assert got["recall"] == pytest.approx(sk.recall_score(y, said))
    assert got["precision"] == pytest.approx(sk.precision_score(y, said))
    assert got["specificity"] == pytest.approx(sk.recall_score(y, said, pos_label=0))
    false, true, _ = sk.roc_curve(y, p[:, 1], drop_intermediate=False)
    assert got["sensitivity_at_95_specificity"] == pytest.approx(true[false <= 0.05].max())


@pytest.mark.parametrize("seed", range(4))
def test_multiclass_against_scikit_learn(seed):
    y, p = draw(seed)
    got = classification_metrics(y, p)
    wanted = np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in range(3)])
    assert got["auc"] == pytest.approx(wanted)
    assert got["f1"] == pytest.approx(sk.f1_score(y, p.argmax(1), average="macro"))
    assert got["recall"] == pytest.approx(sk.recall_score(y, p.argmax(1), average="macro"))
    assert got["precision"] == pytest.approx(sk.precision_score(y, p.argmax(1), average="macro"))
    matrices = sk.multilabel_confusion_matrix(y, p.argmax(1))
    assert got["specificity"] == pytest.approx(np.mean([m[0, 0] / m[0].sum() for m in matrices]))
    said = p.argmax(1)
    assert quadratic_kappa(y, said, 3) == pytest.approx(cohen_kappa_score(y, said, weights="quadratic"))


def test_multilabel():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, (50, 4)), rng.random((50, 4))
    got = classification_metrics(y, p, "multilabel")
    assert got["auc"] == pytest.approx(sk.roc_auc_score(y, p, average="macro"))
    assert got["f1"] == pytest.approx(sk.f1_score(y, p >= 0.5, average="macro"))
    assert got["recall"] == pytest.approx(sk.recall_score(y, p >= 0.5, average="macro"))


def test_undefined_figures_are_nan_not_numbers():
    assert np.isnan(auc(np.zeros(4), np.arange(4)))
    nothing_said = classification_metrics(np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]))
    assert np.isnan(nothing_said["precision"])
    assert nothing_said["recall"] == 0.0
    assert np.isnan(sensitivity_at_specificity(np.ones(4), np.arange(4)))
