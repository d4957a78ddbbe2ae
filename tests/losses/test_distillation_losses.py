"""DINO, iBOT, centring and Sinkhorn-Knopp against their formulas, written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cytossl_monai.losses.dino import DINOLoss, TeacherTarget, entropy
from cytossl_monai.losses.ibot import IBOTPatchLoss
from cytossl_monai.losses.sinkhorn import sinkhorn_knopp


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def naive_sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """As the DINOv2 paper writes it: prototypes x samples, total 1, K rows of 1/K, B columns of 1/B."""
    shares = np.exp(logits / temperature).T
    prototypes, samples = shares.shape
    shares /= shares.sum()
    for _ in range(iterations):
        for k in range(prototypes):
            shares[k] /= shares[k].sum() * prototypes
        for b in range(samples):
            shares[:, b] /= shares[:, b].sum() * samples
    return (shares * samples).T


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_equals_the_loop(iterations: int) -> None:
    logits = torch.randn(9, 5, dtype=torch.float64)
    expected = naive_sinkhorn(logits.numpy(), 0.5, iterations)
    assert np.allclose(sinkhorn_knopp(logits, 0.5, iterations).numpy(), expected, atol=1e-12)


def test_sinkhorn_balances_prototypes() -> None:
    logits = torch.randn(64, 8, dtype=torch.float64)
    logits[:, 0] += 3  # one prototype that everybody likes best
    shares = sinkhorn_knopp(logits, 0.5, 50)
    assert torch.allclose(shares.sum(1), torch.ones(64, dtype=torch.float64))
    assert torch.allclose(shares.sum(0), torch.full((8,), 8.0, dtype=torch.float64), atol=1e-3)


def test_sinkhorn_takes_large_logits_and_empty_batches() -> None:
    assert torch.isfinite(sinkhorn_knopp(100 * torch.randn(6, 4), 0.04)).all()
    assert sinkhorn_knopp(torch.empty(0, 4), 0.1).shape == (0, 4)
    with pytest.raises(ValueError, match="iterations"):
        sinkhorn_knopp(torch.randn(2, 2), 0.1, 0)


def test_centred_targets_equal_the_formula() -> None:
    target = TeacherTarget(4, center_momentum=0.9).double()
    first, second = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    assert np.allclose(target(first, 0.05).numpy(), softmax(first.numpy() / 0.05))
    target.advance()
    center = 0.1 * first.numpy().mean(0)
    assert np.allclose(target.center.numpy()[0], center)
    assert np.allclose(target(second, 0.05).numpy(), softmax((second.numpy() - center) / 0.05))
    target.advance()
    assert np.allclose(target.center.numpy()[0], 0.9 * center + 0.1 * second.numpy().mean(0))


def test_center_of_accumulated_batches_is_that_of_the_large_one() -> None:
    logits = torch.randn(8, 3, dtype=torch.float64)
    whole, parts = TeacherTarget(3).double(), TeacherTarget(3).double()
    whole(logits, 0.1)
    for part in logits.split(2):
        parts(part, 0.1)
    whole.advance()
    parts.advance()
    assert torch.allclose(whole.center, parts.center)
    still = parts.center.clone()
    parts.advance()  # nothing seen since
    assert torch.equal(parts.center, still)
    parts.eval()
    parts(logits, 0.1)
    assert parts.pending_count == 0


def test_dino_equals_the_formula_over_all_pairs() -> None:
    student = [torch.randn(5, 7, dtype=torch.float64) for _ in range(4)]
    targets = [torch.softmax(torch.randn(5, 7, dtype=torch.float64), 1) for _ in range(2)]
    total, pairs = 0.0, 0
    for t in range(2):
        for s in range(4):
            if s == t:
                continue
            predicted = softmax(student[s].numpy() / 0.1)
            total += np.mean([-sum(targets[t][i, k] * math.log(predicted[i, k]) for k in range(7)) for i in range(5)])
            pairs += 1
    assert pairs == 6
    assert DINOLoss(0.1)(student, targets).item() == pytest.approx(float(total) / pairs, abs=1e-10)


def test_dino_needs_two_views() -> None:
    with pytest.raises(ValueError, match="two views"):
        DINOLoss()([torch.randn(2, 3)], [torch.rand(2, 3)])


def test_ibot_equals_the_formula() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    student = torch.randn(4, 5, dtype=torch.float64)
    targets = torch.softmax(torch.randn(4, 5, dtype=torch.float64), 1)
    predicted = softmax(student.numpy() / 0.1)
    each = [-sum(targets[m, k].item() * math.log(predicted[m, k]) for k in range(5)) for m in range(4)]
    expected = ((each[0] + each[1] + each[2]) / 3 + 0 + each[3]) / 3
    assert IBOTPatchLoss(0.1)(student, targets, mask).item() == pytest.approx(expected, abs=1e-12)


def test_ibot_without_masked_patches_is_zero_with_gradients() -> None:
    student = torch.empty(0, 5, requires_grad=True)
    loss = IBOTPatchLoss()(student, torch.empty(0, 5), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None


def test_entropy_of_known_distributions() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    assert entropy(rows).tolist() == pytest.approx([0, math.log(4)])


def test_half_precision_logits_lose_nothing_more() -> None:
    logits = torch.randn(8, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_knopp(logits, 0.05), sinkhorn_knopp(logits.float(), 0.05))
        assert DINOLoss()([logits, logits], [logits.float().softmax(1)] * 2).dtype == torch.float32


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="momentum, sinkhorn"):
        TeacherTarget(3, "mean")
    with pytest.raises(ValueError, match="center_momentum"):
        TeacherTarget(3, center_momentum=1.0)
    with pytest.raises(ValueError, match="student_temperature"):
        DINOLoss(0)
    with pytest.raises(ValueError, match="student_temperature"):
        IBOTPatchLoss(-1)
    with pytest.raises(ValueError, match=r"\(M, K\)"):
        IBOTPatchLoss()(torch.randn(3, 2), torch.rand(4, 2), torch.ones(1, 3) > 0)
