"""What holds for every method: gradients everywhere, teachers without, exact resume, schedules as state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_methods import MULTI_CROP, NEEDS_TOKENS, SMALL, small_method
from tiny_encoders import TinyConv, TinyViT, coloured_views

from cytossl_monai.methods.base import SSLMethod

TOKENLESS = [name for name in SMALL if name not in NEEDS_TOKENS]


def views_for(name: str, seed: int = 0) -> dict[str, list]:
    return coloured_views(seed=seed, local=2 if name in MULTI_CROP else 0)


def trained(method: SSLMethod) -> list[torch.nn.Parameter]:
    return [parameter for parameter in method.parameters() if parameter.requires_grad]


def train(method: SSLMethod, optimiser: torch.optim.Optimizer, name: str, steps: range, total: int) -> list[float]:
    losses = []
    for step in steps:
        loss = method(views_for(name, seed=step))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.update((step + 1) / total)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", SMALL)
def test_every_trained_parameter_has_a_gradient(name: str, tiny_vit: TinyViT) -> None:
    """What DDP with find_unused_parameters=False asks for."""
    method = small_method(name, tiny_vit)
    out = method(views_for(name))
    out["loss"].backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in method.named_parameters() if not p.requires_grad and p.grad is not None] == []
    assert out["loss"].ndim == 0
    assert torch.isfinite(out["loss"])
    assert out["features"].shape == (8, 32)
    assert not out["features"].requires_grad
    assert all(not value.requires_grad for key, value in out.items() if key != "loss")


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_gradients_even_when_nothing_is_masked(name: str, tiny_vit: TinyViT) -> None:
    method = small_method(name, tiny_vit, mask_probability=0.0)
    out = method(views_for(name))
    out["loss"].backward()
    assert out["patch_loss"].item() == 0
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", SMALL)
def test_resume_is_exact(name: str) -> None:
    torch.manual_seed(3)
    method = small_method(name, TinyViT())
    optimiser = torch.optim.AdamW(trained(method), 1e-3)
    train(method, optimiser, name, range(3), 6)
    saved, kept = copy.deepcopy(method.state_dict()), copy.deepcopy(optimiser.state_dict())
    expected = train(method, optimiser, name, range(3, 6), 6)

    torch.manual_seed(99)
    resumed = small_method(name, TinyViT())
    resumed.load_state_dict(saved)
    again = torch.optim.AdamW(trained(resumed), 1e-3)
    again.load_state_dict(kept)
    assert train(resumed, again, name, range(3, 6), 6) == expected
    for key, value in method.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("name", SMALL)
def test_loss_falls_and_nothing_collapses(name: str) -> None:
    torch.manual_seed(1)
    # A teacher as slow as the published ones: one that follows the student within ten steps is chased in circles.
    slow = {"momentum": 0.999, "center_momentum": 0.999} if name in ("dino", "ibot") else {}
    method = small_method(name, TinyViT(), **slow)
    optimiser = torch.optim.AdamW(trained(method), 3e-3)
    views = views_for(name)
    losses = []
    for step in range(30):
        out = method(views)
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        method.update((step + 1) / 300)
        losses.append(out["loss"].item())
    # Targets move with the teacher: losses of self-distillation need not fall from step to step.
    assert sum(losses[-5:]) / 5 < losses[0]
    embedded = torch.nn.functional.normalize(method.encoder(views["global"][0]), dim=1)
    assert embedded.std(0).mean().item() > 0.1 / math.sqrt(32)


@pytest.mark.parametrize("name", TOKENLESS)
def test_encoders_with_batch_normalisation(name: str, tiny_conv: TinyConv) -> None:
    method = small_method(name, tiny_conv)
    views = views_for(name)
    out = method(views)
    out["loss"].backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    if hasattr(method, "teacher"):
        # Online evaluation may leave the teacher in the wrong mode; the next step puts it right.
        method.teacher.eval()
        method(views)
        assert method.teacher.network[1].training
        method.eval()
        assert not method.teacher.network[1].training


@pytest.mark.parametrize("name", sorted(NEEDS_TOKENS))
def test_encoders_without_tokens_are_refused(name: str, tiny_conv: TinyConv) -> None:
    with pytest.raises(ValueError, match=r"vit_small, sr_vit_tiny.*MoCo v3, SimCLR, BYOL and DINO take any"):
        small_method(name, tiny_conv)


@pytest.mark.parametrize("name", SMALL)
def test_mixed_precision(name: str, tiny_vit: TinyViT) -> None:
    method = small_method(name, tiny_vit)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = method(views_for(name))
    assert out["loss"].dtype == torch.float32
    out["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in trained(method))


@pytest.mark.parametrize("name", SMALL)
def test_too_few_views(name: str, tiny_vit: TinyViT) -> None:
    with pytest.raises(ValueError, match="global views"):
        small_method(name, tiny_vit)({"global": []})


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
def test_schedules_are_state(name: str, tiny_vit: TinyViT) -> None:
    method = small_method(name, tiny_vit, freeze_last_layer=0.2, temperature_warmup=0.5)
    assert method.teacher_temperature.item() == pytest.approx(0.04)
    assert method.head.last_layer.gradient_scale == 0
    method.update(0.25)
    assert method.teacher_temperature.item() == pytest.approx(0.055)
    assert method.head.last_layer.gradient_scale == 1
    other = small_method(name, TinyViT(), freeze_last_layer=0.2, temperature_warmup=0.5)
    other.load_state_dict(method.state_dict())
    assert other.teacher_temperature.item() == pytest.approx(0.055)
    method.update(1.0)
    assert method.teacher_temperature.item() == pytest.approx(0.07)


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_the_teacher_is_kept(name: str, tiny_vit: TinyViT) -> None:
    method = small_method(name, tiny_vit)
    assert method.encoder is method.teacher
    assert method.student is tiny_vit
    assert small_method("byol", TinyViT()).encoder is not None


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("dino", {"momentum": 2}, "momentum"),
        ("dino", {"teacher_temperature": 0}, "temperatures"),
        ("dino", {"centering": "none"}, "centering"),
        ("dino", {"freeze_last_layer": 1}, "shares of the run, not epochs"),
        ("ibot", {"temperature_warmup": 30}, "shares of the run, not epochs"),
        ("ibot", {"mask_ratio": (0.5, 0.1)}, "mask_ratio"),
        ("ibot", {"patch_out_dim": 16}, "shared head"),
        ("ibot", {"teacher_patch_temperature": -1}, "temperatures"),
        ("byol", {"momentum": -0.1}, "momentum"),
        ("simclr", {"temperature": 0}, "temperature"),
        ("mae", {"mask_ratio": 1.0}, "mask_ratio"),
        ("mae", {"decoder_dim": 30}, "multiple of 4"),
    ],
)
def test_arguments_are_checked(name: str, change: dict, told: str, tiny_vit: TinyViT) -> None:
    with pytest.raises(ValueError, match=told):
        small_method(name, tiny_vit, **change)
