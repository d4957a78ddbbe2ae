"""InfoNCE against the formula written out, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cytossl_monai.losses.info_nce import InfoNCELoss


def naive_info_nce(queries: np.ndarray, keys: np.ndarray, temperature: float) -> float:
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(queries)):
        weights = [math.exp(float(np.dot(queries[i], k)) / temperature) for k in keys]
        total -= math.log(weights[i] / sum(weights))
    return total / len(queries)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_equals_the_formula(temperature: float) -> None:
    queries, keys = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    expected = naive_info_nce(queries.numpy(), keys.numpy(), temperature)
    assert InfoNCELoss(temperature, scaled=False)(queries, keys).item() == pytest.approx(expected, abs=1e-12)
    assert InfoNCELoss(temperature)(queries, keys).item() == pytest.approx(2 * temperature * expected, abs=1e-12)


def test_gradient_is_right() -> None:
    queries = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(InfoNCELoss(0.3), (queries, keys))


def test_autocast_leaves_the_loss_in_full_precision() -> None:
    queries, keys = torch.randn(16, 8), torch.randn(16, 8)
    expected = InfoNCELoss(0.05)(queries, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = InfoNCELoss(0.05)(queries, keys)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_perfect_match_is_the_lower_bound() -> None:
    keys = torch.eye(6)
    loss = InfoNCELoss(0.1, scaled=False)
    assert loss(keys, keys) < loss(keys.roll(1, 0), keys)
    assert loss(keys, keys).item() == pytest.approx(-math.log(math.exp(10) / (math.exp(10) + 5)), abs=1e-6)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        InfoNCELoss(0.0)
    with pytest.raises(ValueError, match="queries and keys"):
        InfoNCELoss()(torch.randn(4, 3), torch.randn(5, 3))
