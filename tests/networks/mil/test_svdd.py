"""One-class detection: the published distance, taught by negative slides alone."""

from __future__ import annotations

import pytest
import torch

from cytossl_monai.networks.mil.cytology.svdd import DeepSVDD
from cytossl_monai.networks.mil.targets import MILLoss


def test_scores_are_the_mean_of_the_farthest_tiles() -> None:
    model = DeepSVDD(6, top_share=0.3).eval()
    model.centre.copy_(torch.randn(64))
    features, mask = torch.randn(2, 10, 6), torch.arange(10) < torch.tensor([[10], [4]])
    output = model(features, mask)
    for b, n in enumerate((10, 4)):
        far = sorted(
            (float(((model.embed(x) - model.centre) ** 2).sum().detach()) for x in features[b, :n]), reverse=True
        )
        top = far[: -(-3 * n // 10)]
        score = sum(top) / len(top)
        assert float(output.logits[b, 1] - output.logits[b, 0]) == pytest.approx(score, rel=1e-4)


def test_positive_slides_teach_nothing() -> None:
    torch.manual_seed(0)
    first, second = DeepSVDD(6).train(), DeepSVDD(6).train()
    second.load_state_dict(first.state_dict())
    features, labels = torch.randn(4, 8, 6), torch.tensor([0, 1, 0, 1])
    MILLoss(first)(first(features), labels).backward()
    other = features.clone()
    other[labels == 1] = 7.0
    MILLoss(second)(second(other), labels).backward()
    for one, two in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(one.grad, two.grad)
        assert (one.grad != 0).any()
    torch.testing.assert_close(first.centre, second.centre)
    assert (first.centre.abs() >= 0.1 - 1e-6).all()


def test_learns_from_negatives_what_is_foreign() -> None:
    torch.manual_seed(0)
    model = DeepSVDD(8, top_share=0.1)
    basis = torch.randn(3, 8)
    negative = lambda n: torch.randn(n, 30, 3) @ basis  # noqa: E731 - tiles of benign slides span three directions
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    loss = MILLoss(model)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model.train()(negative(4)), torch.zeros(4, dtype=torch.long)).backward()
        optimizer.step()
    benign, malignant = negative(20), negative(20)
    malignant[:, :2] = torch.randn(20, 2, 8) * 4
    model.eval()
    low, high = (model(bags).logits[:, 1] for bags in (benign, malignant))
    assert float((high[:, None] > low[None]).float().mean()) > 0.9  # the AUC
    assert abs(float(low.median())) < 3  # standardised by the negative slides


def test_a_batch_without_negatives_is_passed_over() -> None:
    model = DeepSVDD(6).train()
    loss = MILLoss(model)(model(torch.randn(2, 3, 6)), torch.tensor([1, 1]))
    loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters())
    assert not bool(model.started)


def test_bad_settings_are_told() -> None:
    with pytest.raises(ValueError, match="two outputs"):
        DeepSVDD(6, 3)
    with pytest.raises(ValueError, match="top_share"):
        DeepSVDD(6, 2, top_share=0.0)
