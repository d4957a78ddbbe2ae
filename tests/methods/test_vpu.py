"""VPU learning: the published loss by loops, and a method that learns from slide labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cytossl_monai.losses.vpu import VPULoss, mix_with_positives
from cytossl_monai.methods.vpu import VPU


def test_loss_is_the_formula() -> None:
    positive, unlabelled, mixed, share = (torch.rand(n) for n in (3, 5, 5, 5))
    out = VPULoss(weight=0.03)(positive.log(), unlabelled.log(), mixed.log(), share)
    variational = math.log(sum(unlabelled.tolist()) / 5) - sum(math.log(p) for p in positive.tolist()) / 3
    consistency = (
        sum(
            (math.log(g + (1 - g) * u) - math.log(m)) ** 2
            for g, u, m in zip(share.tolist(), unlabelled.tolist(), mixed.tolist())
        )
        / 5
    )
    assert float(out["variational"]) == pytest.approx(variational, rel=1e-4)
    assert float(out["consistency"]) == pytest.approx(consistency, rel=1e-4)
    assert float(out["loss"]) == pytest.approx(variational + 0.03 * consistency, rel=1e-4)


def test_mixing_takes_a_positive_for_each() -> None:
    positive, unlabelled, share = torch.rand(2, 3, 4, 4), torch.rand(5, 3, 4, 4), torch.rand(5)
    mixed = mix_with_positives(positive, unlabelled, share)
    for i in range(5):
        torch.testing.assert_close(mixed[i], share[i] * positive[i % 2] + (1 - share[i]) * unlabelled[i])


def test_shares_are_drawn_from_the_beta() -> None:
    torch.manual_seed(0)
    drawn = VPULoss(beta=0.3).draw_shares(20_000)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(drawn.var()) == pytest.approx(1 / (4 * (2 * 0.3 + 1)), abs=0.005)


class Means(nn.Module):
    """A linear map of the mean colour."""

    embed_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.mean((2, 3)))


def test_learns_to_tell_foreign_tiles() -> None:
    """Half of the unlabelled tiles are like the positives: the others must come out less positive than those."""
    torch.manual_seed(0)
    method = VPU(Means())
    optimizer = torch.optim.Adam(method.parameters(), 0.05)
    images, label = torch.rand(48, 3, 4, 4) * 0.2, torch.arange(48) % 3
    foreign = label == 2
    images[foreign, 0] += 0.8
    for _ in range(150):
        optimizer.zero_grad()
        out = method({"global": [images], "label": (label > 0).long()})
        out["loss"].backward()
        optimizer.step()
    score = method.head(method.encoder(images)).squeeze(1)
    assert float(score[foreign].max()) < float(score[~foreign].min())
    assert out["features"].shape == (48, 4)


def test_a_batch_of_one_kind_is_passed_over_and_labels_are_asked_for() -> None:
    method = VPU(Means())
    out = method({"global": [torch.rand(4, 3, 4, 4)], "label": torch.zeros(4, dtype=torch.long)})
    out["loss"].backward()
    assert float(out["loss"].detach()) == 0.0
    with pytest.raises(ValueError, match="LabelTilesd"):
        method({"global": [torch.rand(4, 3, 4, 4)]})
    with pytest.raises(ValueError, match="slides of both kinds"):
        method.loss(torch.rand(0), torch.rand(3), torch.rand(3), torch.rand(3))
