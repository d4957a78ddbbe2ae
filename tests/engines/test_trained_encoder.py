"""Settings of the encoder that is trained, for every method: rates by layer, accumulation, checkpointing, clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_methods import small_method
from ssl_standins import dark_spots, make_trainer
from test_ddp_equals_one import METHODS, build

from cytossl_monai.engines.ssl.optim import build_optimizer, clip_gradients, encoder_depth, layer_of, param_groups
from cytossl_monai.engines.ssl.wrap import prepare
from cytossl_monai.methods import SSLMethod
from cytossl_monai.methods.base import trained_encoder
from cytossl_monai.transforms.views.generator import ViewGenerator


def views_of(name: str) -> ViewGenerator:
    n_local = 2 if name in ("dino", "ibot") else 0
    return ViewGenerator(24, 12, 1 if name == "mae" else 2, n_local, ncp_views="all", segmenter=dark_spots)


@pytest.mark.parametrize("name", METHODS)
def test_every_layer_of_the_student_has_its_rate(name: str) -> None:
    method: Any = build(name)
    scales = {id(p): group["lr_scale"] for group in param_groups(method, 0.05, 0.5) for p in group["params"]}
    depth = encoder_depth(method.student)
    assert depth == 2
    of_student = {
        parameter_name: scales[id(parameter)]
        for parameter_name, parameter in method.student.named_parameters()
        if parameter.requires_grad
    }
    assert of_student == {key: 0.5 ** max(0, depth - layer_of(key, depth)) for key in of_student}
    assert {0.25, 0.5, 1.0} <= set(of_student.values()) or not method.student.network.patch_embedding.parameters()
    inside = {id(parameter) for parameter in method.student.parameters()}
    assert {scale for key, scale in scales.items() if key not in inside} <= {1.0}


@pytest.mark.parametrize("name", METHODS)
def test_the_student_sees_a_piece_of_the_batch_at_a_time(name: str) -> None:
    method: Any = build(name)
    trainer = make_trainer(None, steps=1, batch=8, method=method, views=views_of(name), accumulation_steps=4)
    seen: list[int] = []
    method.student.network.blocks[0].register_forward_hook(
        lambda _, inputs, __: seen.append(len(inputs[0])) if torch.is_grad_enabled() else None
    )
    trainer.run()
    assert seen
    views = 1 if name == "mae" else 2
    assert max(seen) <= views * 8 // 4


@pytest.mark.parametrize("name", METHODS)
def test_the_students_blocks_are_recomputed(name: str) -> None:
    method: Any = build(name)
    prepare(method, "cpu", activation_checkpointing=True)
    assert trained_encoder(method) is method.student
    assert method.student.network.checkpoint_activations
    calls: list[int] = []
    method.student.network.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    views = {
        "global": [torch.rand(4, 3, 24, 24).double() for _ in range(1 if name == "mae" else 2)],
        "nuclei": [torch.zeros(4, 1, 24, 24, dtype=torch.bool)] * 2,
    }
    loss = method.train()(views)["loss"]
    before = len(calls)
    loss.backward()
    assert len(calls) > before


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_prototypes_thaw_as_if_their_training_began_then(name: str) -> None:
    """The published code takes their gradients away: Adam has no state of the frozen steps, and nothing decays."""
    method: Any = build(name)
    method.freeze_share = 0.5
    method.follow_schedules(0.0)
    optimizer = build_optimizer(method, lr=1e-2, weight_decay=0.5)
    weight = method.head.last_layer.weight
    start = weight.detach().clone()
    for step in range(4):
        torch.manual_seed(step)
        views = {"global": [torch.rand(4, 3, 24, 24).double() for _ in range(2)]}
        optimizer.zero_grad()
        method.train()(views)["loss"].backward()
        assert weight.grad is not None  # DDP asks for it
        method.prepare_gradients()
        gradient = None if weight.grad is None else weight.grad.clone()
        optimizer.step()
        method.update((step + 1) / 4)
        if step < 2:
            assert gradient is None
            assert torch.equal(weight, start)
            assert weight not in optimizer.state
    assert int(optimizer.state[weight]["step"]) == 2
    again: Any = build(name)
    again.freeze_share = 0.5
    again.follow_schedules(0.0)
    again.load_state_dict(method.state_dict())
    assert not again.head.last_layer.frozen


def test_prototypes_start_with_the_norm_of_the_published_head() -> None:
    head = small_method("dino", build("dino").student, out_dim=4096, bottleneck_dim=256, hidden_dim=8).head
    assert head.last_layer.weight.norm(dim=1).mean().item() == pytest.approx(3**-0.5, rel=0.01)


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_gradients_are_bounded_together_or_one_by_one() -> None:
    one, other = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.SGD([one, other], lr=1.0)

    def set_gradients() -> None:
        one.grad, other.grad = torch.full((3,), 0.1), torch.full((4, 4), 2.0)

    set_gradients()
    total = clip_gradients(optimizer, 1.0, "parameter")
    assert total.item() == pytest.approx((3 * 0.01 + 16 * 4.0) ** 0.5)
    assert torch.equal(gradient(one), torch.full((3,), 0.1))  # its own norm is below the bound
    assert gradient(other).norm().item() == pytest.approx(1.0, abs=1e-4)
    set_gradients()
    assert clip_gradients(optimizer, 1.0).item() == pytest.approx(total.item())
    assert torch.cat([gradient(one), gradient(other).flatten()]).norm().item() == pytest.approx(1.0, abs=1e-4)


def test_a_method_without_an_encoder_is_named() -> None:
    with pytest.raises(ValueError, match="Linear has no encoder"):
        prepare(torch.nn.Linear(2, 2), "cpu", activation_checkpointing=True)
    assert trained_encoder(torch.nn.Linear(2, 2)) is None
    assert isinstance(build("dino"), SSLMethod)
