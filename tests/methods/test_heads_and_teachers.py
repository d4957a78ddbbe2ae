"""Heads, the joined batch normalisation, momentum teachers, schedules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_encoders import TinyConv
from torch import nn

from cytossl_monai.methods.parts.batchnorm import GatherBatchNorm, synchronise_batchnorm
from cytossl_monai.methods.parts.heads import DINOHead, UnitLinear, mlp_head
from cytossl_monai.methods.parts.momentum import follow, make_teacher, set_teacher_mode
from cytossl_monai.methods.parts.schedules import cosine, linear_warmup


def test_mlp_head_has_the_published_layers() -> None:
    moco = mlp_head(12, 20, 8, num_layers=3, last_norm=True)
    assert [type(layer).__name__ for layer in moco] == [
        "Linear", "GatherBatchNorm", "ReLU", "Linear", "GatherBatchNorm", "ReLU", "Linear", "GatherBatchNorm",
    ]  # fmt: skip
    assert not moco[-1].affine
    assert all(layer.bias is None for layer in moco if isinstance(layer, nn.Linear))
    assert moco(torch.randn(4, 12)).shape == (4, 8)
    assert all(layer.bias is not None for layer in mlp_head(3, 4, 5, bias=True) if isinstance(layer, nn.Linear))
    with pytest.raises(ValueError, match="num_layers"):
        mlp_head(3, 4, 5, num_layers=0)


def test_prototypes_have_length_one_and_freeze() -> None:
    layer = UnitLinear(6, 10)
    unit = torch.nn.functional.normalize(torch.randn(3, 6), dim=1)
    expected = unit @ (layer.weight / layer.weight.norm(dim=1, keepdim=True)).T
    assert torch.allclose(layer(unit), expected, atol=1e-6)
    assert layer(unit).abs().max() <= 1 + 1e-6
    layer.freeze(True)
    layer(unit).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() == 0
    layer.freeze(False)
    layer(unit).square().sum().backward()
    assert layer.weight.grad.abs().max() > 0


def test_frozen_prototypes_stand_still_under_adamw() -> None:
    layer = UnitLinear(6, 10)
    layer.freeze(True)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    unit = torch.nn.functional.normalize(torch.randn(3, 6), dim=1)
    before = layer(unit).detach()
    layer(unit).square().sum().backward()
    optimiser.step()
    assert torch.allclose(layer(unit), before, atol=1e-6)


def test_dino_head_is_bounded_and_takes_no_rows() -> None:
    head = DINOHead(8, 20, 16, 6)
    assert head(10 * torch.randn(5, 8)).abs().max() <= 1 + 1e-5
    assert head(torch.empty(0, 8)).shape == (0, 20)
    gained = DINOHead(8, 20, 16, 6, learn_gain=True)
    gained(torch.randn(3, 8)).sum().backward()
    assert gained.last_layer.gain.grad.abs().max() > 0


def test_batchnorm_alone_is_torch_batchnorm() -> None:
    ours, theirs = GatherBatchNorm(5), nn.BatchNorm1d(5)
    for _ in range(3):
        rows = torch.randn(7, 5)
        assert torch.equal(ours(rows), theirs(rows))
    assert torch.equal(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    assert torch.equal(ours(rows), theirs(rows))
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_synchronise_keeps_parameters_names_and_results() -> None:
    encoder = TinyConv()
    images, before = torch.rand(4, 3, 32, 32), copy.deepcopy(encoder)
    names = list(encoder.state_dict())
    parameters = list(encoder.parameters())
    assert synchronise_batchnorm(encoder) is encoder
    assert list(encoder.state_dict()) == names
    assert all(a is b for a, b in zip(encoder.parameters(), parameters, strict=True))
    assert torch.equal(encoder(images), before(images))
    assert isinstance(synchronise_batchnorm(nn.BatchNorm2d(3)), GatherBatchNorm)


def test_teacher_drops_nothing_but_normalises_by_batch() -> None:
    teacher = make_teacher(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)))
    assert [module.training for module in teacher] == [False, True, False]
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    set_teacher_mode(teacher, training=False)
    assert not teacher[1].training


def test_follow_is_the_moving_average() -> None:
    student = nn.Linear(3, 2)
    teacher = make_teacher(student)
    start = teacher.weight.clone()
    with torch.no_grad():
        student.weight.add_(1.0)
    follow(teacher, student, 0.75)
    assert torch.allclose(teacher.weight, start + 0.25)
    with pytest.raises(ValueError, match="momentum"):
        follow(teacher, student, 1.1)


def test_schedules() -> None:
    assert cosine(0.99, 1.0, 0.0) == pytest.approx(0.99)
    assert cosine(0.99, 1.0, 1.0) == pytest.approx(1.0)
    # MoCo v3 writes it as 1 - 0.5 (1 + cos(pi p)) (1 - m).
    for progress in (0.1, 0.5, 0.8):
        published = 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - 0.99)
        assert cosine(0.99, 1.0, progress) == pytest.approx(published)
    assert linear_warmup(0.04, 0.07, 0.05, 0.1) == pytest.approx(0.055)
    assert linear_warmup(0.04, 0.07, 0.1, 0.1) == 0.07
    assert linear_warmup(0.04, 0.07, 0.0, 0.0) == 0.07
    with pytest.raises(ValueError, match="progress"):
        cosine(0, 1, 1.5)
