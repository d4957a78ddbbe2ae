"""MoCo v3 step by step against the paper's algorithm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import TinyConv, TinyViT, coloured_views

from cytossl_monai.methods.moco_v3 import MoCoV3


def small(encoder: torch.nn.Module, **changes: object) -> MoCoV3:
    return MoCoV3(encoder, **{"dim": 16, "hidden_dim": 32, **changes})


def test_loss_is_algorithm_1(tiny_vit: TinyViT) -> None:
    method = small(tiny_vit).double()
    views = {"global": [view.double() for view in coloured_views()["global"]]}
    loss = method(views)["loss"]

    twin = copy.deepcopy(method)
    q = [F.normalize(twin.predictor(twin.projector(twin.student(view))), dim=1) for view in views["global"]]
    k = [F.normalize(twin.teacher_projector(twin.teacher(view)), dim=1) for view in views["global"]]
    expected = torch.zeros((), dtype=torch.float64)
    for query, key in ((q[0], k[1]), (q[1], k[0])):
        logits = query @ key.T / 0.2
        expected += 2 * 0.2 * (logits.logsumexp(1) - logits.diagonal()).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)


def test_teacher_follows_and_never_learns(tiny_vit: TinyViT) -> None:
    method = small(tiny_vit, momentum=0.9)
    optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    method(coloured_views())["loss"].backward()
    optimiser.step()
    before = copy.deepcopy(method)
    method.update(0.0)
    for old, new, student in zip(
        before.teacher.parameters(), method.teacher.parameters(), method.student.parameters(), strict=True
    ):
        assert new.grad is None
        assert torch.allclose(new, 0.9 * old + 0.1 * student, atol=1e-6)
    middle = copy.deepcopy(method)
    method.update(1.0)  # the momentum has reached 1: the teacher stands still
    assert all(torch.equal(a, b) for a, b in zip(middle.teacher.parameters(), method.teacher.parameters()))


def test_frozen_patch_projection_stays(tiny_vit: TinyViT) -> None:
    method = small(tiny_vit, freeze_patches=True)
    assert not method.student.network.patch_embedding.weight.requires_grad
    assert method.student.network.cls_token.requires_grad
    with pytest.raises(ValueError, match="patch_embedding"):
        small(TinyConv(), freeze_patches=True)


def test_views_are_checked(tiny_vit: TinyViT) -> None:
    with pytest.raises(ValueError, match="needs 2 global views, got 1"):
        small(tiny_vit)({"global": coloured_views()["global"][:1]})
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        small(tiny_vit)({"global": [torch.zeros(2, 1, 8, 8)] * 2})
    with pytest.raises(ValueError, match="momentum"):
        small(tiny_vit, momentum=1.5)
    with pytest.raises(ValueError, match="embed_dim"):
        small(torch.nn.Linear(2, 2))
