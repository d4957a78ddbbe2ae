"""NT-Xent, BYOL, KoLeo and the masked pixel loss against their formulas, written out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.losses import ContrastiveLoss

from cytossl_monai.losses.byol import BYOLLoss
from cytossl_monai.losses.koleo import KoLeoLoss
from cytossl_monai.losses.mae import MaskedPixelLoss, patchify
from cytossl_monai.losses.nt_xent import NTXentLoss


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pair(batch: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, width, dtype=torch.float64), torch.randn(batch, width, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_equals_the_formula(temperature: float) -> None:
    first, second = pair()
    views = unit(np.concatenate([first.numpy(), second.numpy()]))
    total = 0.0
    for i in range(12):
        others = [k for k in range(12) if k != i]
        weights = {k: math.exp(float(views[i] @ views[k]) / temperature) for k in others}
        total -= math.log(weights[(i + 6) % 12] / sum(weights.values()))
    assert NTXentLoss(temperature)(first, second).item() == pytest.approx(total / 12, abs=1e-12)


def test_nt_xent_is_monai_contrastive_loss() -> None:
    first, second = (tensor.requires_grad_() for tensor in pair(9, 7))
    # MONAI rounds the temperature to float32: one that has no rounding.
    ours = NTXentLoss(0.25)(first, second)
    theirs = ContrastiveLoss(temperature=0.25)(first, second)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-10)
    for mine, other in zip(
        torch.autograd.grad(ours, (first, second)), torch.autograd.grad(theirs, (first, second)), strict=True
    ):
        assert torch.allclose(mine, other, atol=1e-10)


def test_nt_xent_survives_a_temperature_that_overflows_float32() -> None:
    first = torch.randn(8, 16)
    assert torch.isfinite(NTXentLoss(0.005)(first, first.flip(0)))
    assert not torch.isfinite(ContrastiveLoss(temperature=0.005)(first, first.flip(0)))


def test_byol_is_the_squared_distance_of_unit_vectors() -> None:
    first, second = pair()
    expected = np.mean(np.sum((unit(first.numpy()) - unit(second.numpy())) ** 2, axis=1))
    assert BYOLLoss()(first, second).item() == pytest.approx(expected, abs=1e-12)
    assert BYOLLoss()(first, 3 * first).item() == pytest.approx(0, abs=1e-12)
    assert BYOLLoss()(first, -first).item() == pytest.approx(4, abs=1e-12)


def test_byol_stops_the_gradient_at_the_target() -> None:
    first, second = (tensor.requires_grad_() for tensor in pair())
    BYOLLoss()(first, second).backward()
    assert first.grad is not None
    assert second.grad is None


def test_koleo_equals_the_formula() -> None:
    rows, _ = pair(7, 4)
    unit_rows = unit(rows.numpy())
    total = 0.0
    for i in range(7):
        nearest = min(float(np.linalg.norm(unit_rows[i] - unit_rows[j])) for j in range(7) if j != i)
        total -= math.log(nearest)
    assert KoLeoLoss()(rows).item() == pytest.approx(total / 7, abs=1e-6)


def test_koleo_spreads_and_stays_finite_where_points_coincide() -> None:
    same = torch.ones(4, 3, requires_grad=True)
    loss = KoLeoLoss()(same)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(same.grad).all()
    assert KoLeoLoss()(torch.eye(4)) < KoLeoLoss()(torch.eye(4) + 0.5)
    with pytest.raises(ValueError, match="at least 2"):
        KoLeoLoss()(torch.randn(1, 3))


def test_patches_are_cut_row_by_row() -> None:
    images = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).reshape(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    for number in range(6):
        row, column = divmod(number, 3)
        block = images[1, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        assert torch.equal(patches[1, number], block.permute(1, 2, 0).reshape(-1))
    with pytest.raises(ValueError, match="not multiples"):
        patchify(images, 5)


@pytest.mark.parametrize("normalise", [True, False])
def test_masked_pixels_equal_the_formula(normalise: bool) -> None:
    predictions, patches = torch.randn(2, 5, 6, dtype=torch.float64), torch.rand(2, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    errors = []
    for b in range(2):
        for n in range(5):
            if mask[b, n]:
                target = patches[b, n].numpy()
                if normalise:
                    target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
                errors.append(((predictions[b, n].numpy() - target) ** 2).mean())
    found = MaskedPixelLoss(normalise)(predictions, patches, mask)
    assert found.item() == pytest.approx(float(np.mean(errors)), abs=1e-12)


def test_visible_patches_do_not_count() -> None:
    patches, mask = torch.rand(1, 4, 3), torch.tensor([[True, False, True, False]])
    predictions = torch.rand(1, 4, 3)
    changed = predictions.clone()
    changed[0, 1] += 100
    loss = MaskedPixelLoss()
    assert torch.equal(loss(predictions, patches, mask), loss(changed, patches, mask))


def test_blank_patches_are_finite() -> None:
    assert torch.isfinite(MaskedPixelLoss()(torch.zeros(1, 2, 6), torch.full((1, 2, 6), 0.9), torch.ones(1, 2) > 0))


@pytest.mark.parametrize("loss", [NTXentLoss(), BYOLLoss()])
def test_shapes_are_checked(loss: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"\(B, D\)"):
        loss(torch.randn(3, 2), torch.randn(4, 2))
