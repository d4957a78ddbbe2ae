"""Probabilities that stand for a prevalence: the balanced draw of training is taken back, for every kind of target."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from cytossl_monai.handlers.best_classifier import BestClassifier
from cytossl_monai.metrics.calibration import (
    brier_score,
    class_shares,
    classwise_calibration_error,
    fit_calibration,
    fit_temperature,
    reliability_bins,
    training_prior,
)
from cytossl_monai.metrics.classification import classification_metrics, specificity_at_sensitivity
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.mil.ensemble import MILEnsemble
from cytossl_monai.networks.mil.targets import class_probabilities, prior_shift
from cytossl_monai.visualize.curves_mil import plot_reliability


def cohort(seed: int, n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """One feature that overlaps, and labels of that share of positives."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < share).astype(int)
    return labels[:, None] * 1.2 + rng.normal(size=(n, 1)), labels


def balanced_logits(seed: int, n: int, share: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 2) logits of a classifier that was trained with the classes in balance."""
    x, y = cohort(0, 20000, 0.5)
    model = LogisticRegression().fit(x, y)
    held, labels = cohort(seed, n, share)
    score = torch.from_numpy(model.decision_function(held))
    return torch.stack([-score / 2, score / 2], 1), torch.from_numpy(labels)


def test_mean_probability_is_the_prevalence_and_not_that_of_balance() -> None:
    """A cohort of 10 % positives, as in a screening: one temperature cannot move what the balanced draw moved."""
    logits, labels = balanced_logits(1, 200)
    test, truth = balanced_logits(2, 20000)
    temperature = fit_temperature(logits, labels)
    old = torch.softmax(test / temperature, 1)
    shift = prior_shift(torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1]), "multiclass")
    fitted, bias = fit_calibration(logits, labels, shift=shift)
    new = class_probabilities(test / fitted, "multiclass", bias)
    assert float(old[:, 1].mean()) > 0.25
    assert float(new[:, 1].mean()) == pytest.approx(0.1, abs=0.03)
    assert brier_score(truth.numpy(), new.numpy()) < 0.7 * brier_score(truth.numpy(), old.numpy())
    assert classwise_calibration_error(truth.numpy(), new.numpy()) < 0.05
    assert classwise_calibration_error(truth.numpy(), old.numpy()) > 0.15


@pytest.mark.parametrize("target", ["multiclass", "ordinal", "multilabel"])
def test_a_change_of_prior_is_bayes_rule(target: str) -> None:
    """Against the rule written out for one slide."""
    logits = torch.randn(4, 2 if target == "ordinal" else 3).double()
    before, after = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.3, 0.1])
    plain = class_probabilities(logits, target)
    moved = class_probabilities(logits, target, prior_shift(before, after, target))
    for row in range(4):
        for c in range(3):
            if target == "multilabel":
                present = plain[row, c] * after[c] / before[c]
                absent = (1 - plain[row, c]) * (1 - after[c]) / (1 - before[c])
                expected = present / (present + absent)
            else:
                terms = [float(plain[row, k] * after[k] / before[k]) for k in range(3)]
                expected = terms[c] / sum(terms)
            assert float(moved[row, c]) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("target", ["multiclass", "ordinal", "multilabel"])
def test_on_few_slides_the_known_prior_holds_and_on_many_the_slides_decide(target: str) -> None:
    shift = torch.tensor([0.5, 0.0, -1.0]).double()
    wanted = torch.tensor([0.8, 0.3, -1.5]).double()
    logits = torch.randn(4000, 2 if target == "ordinal" else 3).double()
    found = class_probabilities(logits, target, wanted)
    labels = torch.bernoulli(found) if target == "multilabel" else torch.multinomial(found, 1)[:, 0]
    temperature, bias = fit_calibration(logits, labels, target, shift)
    assert temperature == pytest.approx(1.0, abs=0.15)
    moved = class_probabilities(logits / temperature, target, bias)
    np.testing.assert_allclose(moved.mean(0).numpy(), found.mean(0).numpy(), atol=0.02)
    _, few = fit_calibration(logits[:3], labels[:3], target, shift, prior=100.0)
    torch.testing.assert_close(few, shift, atol=0.05, rtol=0)
    temperature, bias = fit_calibration(logits[:0], labels[:0], target, shift)
    assert temperature == 1.0
    assert torch.equal(bias, shift)


def test_what_training_sees() -> None:
    items = [{"label": label, "classes": ["a", "b", "c"]} for label in [0] * 6 + [1] * 3 + [2]]
    found = training_prior(items, "multiclass")
    assert found["cohort"].tolist() == pytest.approx([0.6, 0.3, 0.1])
    assert found["seen"].tolist() == pytest.approx([1 / 3] * 3)
    drawn_as_they_are = training_prior(items, "ordinal", balanced=False, class_weights=torch.tensor([1.0, 2.0, 6.0]))
    assert drawn_as_they_are["seen"].tolist() == pytest.approx([1 / 3] * 3)
    findings = [{"label": row, "classes": ["a", "b"]} for row in [[0, 0]] * 7 + [[1, 0]] * 2 + [[1, 1]]]
    many = training_prior(findings, "multilabel")
    assert many["cohort"].tolist() == pytest.approx([0.3, 0.1])
    assert many["seen"].tolist() == pytest.approx([2 / 3, 1 / 3])  # three combinations, each a third
    assert class_shares([0, 0, 1], "multiclass", 3).min() > 0


@pytest.mark.parametrize("target", ["multiclass", "ordinal", "multilabel"])
def test_a_classifier_is_told_where_it_will_be_used(target: str) -> None:
    outputs = 2 if target == "ordinal" else 3
    made = MILClassifier(ABMIL(6, outputs), ["a", "b", "c"], target, prevalence=[0.2, 0.3, 0.5]).eval()
    bags = torch.randn(5, 4, 6)
    before = made(bags)
    made.set_prevalence([0.6, 0.3, 0.1])
    assert (made(bags)[:, 0] > before[:, 0]).all()
    assert (made(bags)[:, 2] < before[:, 2]).all()
    made.set_prevalence([0.2, 0.3, 0.5])
    torch.testing.assert_close(made(bags), before)
    with pytest.raises(ValueError, match="share of each of"):
        made.set_prevalence([0.6, 0.4])
    with pytest.raises(ValueError, match="give the share of each"):  # before training, not after it
        BestClassifier(Engine(lambda *_: None), made, "model.pt", prevalence=[0.6, 0.4])
    with pytest.raises(ValueError, match="does not say which prevalence"):
        MILClassifier(ABMIL(6, outputs), ["a", "b", "c"], target).set_prevalence([0.2, 0.3, 0.5])
    scripted = torch.jit.script(made)
    torch.testing.assert_close(scripted(bags), made(bags))


def test_classifiers_of_before_are_read_as_they_were() -> None:
    old = MILClassifier(MILEnsemble([ABMIL(6, 2), ABMIL(6, 2)], temperatures=[0.5, 2.0]), ["a", "b"]).eval()
    state = {
        key: value for key, value in old.state_dict().items() if "bias" not in key.split(".")[-1][:4] or "." in key
    }
    state = {key: value for key, value in state.items() if key not in ("bias", "prevalence", "network.biases")}
    assert len(state) == len(old.state_dict()) - 3
    again = MILClassifier(MILEnsemble([ABMIL(6, 2), ABMIL(6, 2)], temperatures=[0.5, 2.0]), ["a", "b"]).eval()
    again.load_state_dict(state)
    bags = torch.randn(3, 4, 6)
    torch.testing.assert_close(again(bags), old(bags))


def test_an_ensemble_averages_what_its_members_say_with_their_biases() -> None:
    members = [ABMIL(6, 3).eval(), ABMIL(6, 3).eval()]
    biases = [[0.3, 0.0, -1.0], [0.0, 0.5, 0.1]]
    made = MILClassifier(MILEnsemble(members, temperatures=[0.5, 2.0], biases=biases), ["a", "b", "c"]).eval()
    x = torch.randn(4, 7, 6)
    each = [
        torch.softmax(member(x).logits / t + torch.tensor(bias), 1)
        for member, t, bias in zip(members, (0.5, 2.0), biases)
    ]
    torch.testing.assert_close(made(x), sum(each) / 2)


def test_reliability_points_are_scikit_learns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    said = rng.random((400, 2))
    said /= said.sum(1, keepdims=True)
    labels = (rng.random(400) < said[:, 1] ** 2).astype(int)
    shares, means = calibration_curve(labels, said[:, 1], n_bins=10)
    points = reliability_bins(labels, said[:, 1])
    np.testing.assert_allclose(points[:, :2], np.stack([means, shares], 1))
    naive = np.sum(np.abs(points[:, 0] - points[:, 1]) * points[:, 2]) / 400
    assert classwise_calibration_error(labels, said) == pytest.approx(naive)  # of two classes both have the same gap
    plot_reliability(tmp_path / "r.png", labels, said, ["negative", "positive"])
    with Image.open(io.BytesIO((tmp_path / "r.png").read_bytes())) as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_specificity_of_a_screening_is_a_point_of_the_curve() -> None:
    rng = np.random.default_rng(4)
    labels = (rng.random(300) < 0.2).astype(int)
    scores = labels + rng.normal(size=300)
    best = max(
        float(np.mean(scores[labels == 0] < threshold))
        for threshold in scores
        if np.mean(scores[labels == 1] >= threshold) >= 0.95
    )
    assert specificity_at_sensitivity(labels, scores) == pytest.approx(best)
    share = 1 / (1 + np.exp(-scores))
    figures = classification_metrics(labels, np.stack([1 - share, share], 1))
    assert figures["specificity_at_95_sensitivity"] == pytest.approx(best)
    assert np.isnan(specificity_at_sensitivity(np.zeros(4), np.arange(4.0)))
