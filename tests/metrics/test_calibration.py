import numpy as np
import pytest
import torch

from cytossl_monai.metrics.calibration import brier_score, expected_calibration_error, fit_temperature
from cytossl_monai.networks.mil.targets import class_probabilities


def overconfident(n=4000, factor=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 3, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)[:, 0]
    return logits * factor, labels


def test_temperature_finds_the_factor_and_lowers_ece():
    logits, labels = overconfident()
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(3.0, rel=0.08)
    before = expected_calibration_error(labels.numpy(), torch.softmax(logits, 1).numpy())
    after = expected_calibration_error(labels.numpy(), torch.softmax(logits / temperature, 1).numpy())
    assert before > 0.15
    assert after < 0.03


@pytest.mark.parametrize("target", ["ordinal", "multilabel"])
def test_other_targets(target):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator)
    p = class_probabilities(logits, target)
    labels = (
        torch.multinomial(p, 1, generator=generator)[:, 0]
        if target == "ordinal"
        else torch.bernoulli(p, generator=generator).long()
    )
    assert fit_temperature(logits * 2, labels, target) == pytest.approx(2.0, rel=0.08)


def test_a_handful_of_right_slides_claims_no_certainty():
    logits, labels = torch.tensor([[2.0, -2.0], [-2.0, 2.0]] * 3), torch.tensor([0, 1] * 3)
    assert fit_temperature(logits, labels, prior=0.0) == pytest.approx(0.25, abs=1e-3)
    assert 0.5 < fit_temperature(logits, labels) <= 1.0
    assert fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)) == 1.0


def test_ece_and_brier_by_hand():
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.35, 0.65], [0.35, 0.65]])
    y = np.array([0, 1, 1, 1])
    assert expected_calibration_error(y, p) == pytest.approx(0.5 * abs(0.9 - 0.5) + 0.5 * abs(0.65 - 1))
    assert brier_score(y, p) == pytest.approx(np.mean([0.02, 1.62, 0.245, 0.245]))
