"""The fused kernels against the plain reference, in Triton's interpreter where there is no GPU, and compiled ahead."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sparse_attention import RPES, gradients
from torch import Tensor
from triton_kernels import compiled_ahead, device_of_kernels

from cytossl_monai.networks.blocks import sparse_attention
from cytossl_monai.networks.blocks.attention.dense import attend
from cytossl_monai.networks.blocks.attention.in_triton import fused, fused_op
from cytossl_monai.networks.blocks.attention.in_triton.fused import fused_attention, fused_pays
from cytossl_monai.networks.blocks.attention.reference import reference_attention
from cytossl_monai.networks.blocks.irpe import RPETables
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention
from cytossl_monai.networks.blocks.token_layout import TokenLayout

HEADS, WIDTH, GRID = 2, 16, (9, 6)
SPARSE = {
    "none": {"sparsity": "none"},
    "topk": {"sparsity": "topk", "keep_ratio": 0.3},
    "topk 16": {"sparsity": "topk", "num_keys": 16},
    "topk 16 all": {"sparsity": "topk", "num_keys": 16, "sparse_prefix": True},  # as published
}


@pytest.fixture(scope="module")
def device() -> torch.device:
    return device_of_kernels()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Fused wherever it can do what is asked, on any device and of any dtype; says when it was taken."""
    calls: list[bool] = []

    def pays(qkv: Tensor, tables: Any, mask: Tensor | None, keep: Any, dropout: float) -> bool:
        calls.append(mask is None or mask.shape[1:3] == (1, 1))
        return calls[-1]

    monkeypatch.setattr(sparse_attention, "fused_pays", pays)
    return calls


def module_of(sparsity: str, rpe: object, prefix: int) -> SparseAttention:
    module = SparseAttention(
        HEADS * WIDTH,
        HEADS,
        qkv_bias=True,
        rpe=rpe,  # type: ignore[arg-type]
        has_class_token=prefix > 0,
        has_registers=prefix > 1,
        **SPARSE[sparsity],  # type: ignore[arg-type]
    )
    for table in () if module.irpe is None else module.irpe.parameters():
        torch.nn.init.normal_(table, std=0.5)
    torch.nn.init.normal_(module.qkv.weight, std=0.4)
    return module


def by_reference(module: SparseAttention, x: Tensor, layout: TokenLayout) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    chosen = (module.sparsity, module.keep_ratio, 0, 0, module.num_keys, module.sparse_prefix)
    return module.out_proj(reference_attention(q, k, v, layout, module.irpe, *chosen)[0].transpose(1, 2).flatten(2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rpe", "prefix"), zip([*RPES, RPES[3], RPES[4], {"on": "v"}], itertools.cycle((0, 1, 3))))
@pytest.mark.parametrize("sparsity", SPARSE)
def test_equals_reference(
    sparsity: str, rpe: object, prefix: int, masked: bool, device: torch.device, taken: list[bool]
) -> None:
    torch.set_float32_matmul_precision("highest")
    module, valid = module_of(sparsity, rpe, prefix).to(device), None
    if masked:
        valid = torch.rand(2, 54) > 0.4
        valid[0] = False
        valid[0, 10:14] = True  # fewer patches than a query may keep
        valid = valid.to(device)
    x = torch.randn(2, prefix + 54, HEADS * WIDTH).to(device).requires_grad_()
    weight = torch.randn(2, prefix + 54, HEADS * WIDTH).to(device)
    if valid is not None:  # what comes out for a token that takes no part means nothing
        weight[:, prefix:] *= valid.unsqueeze(-1)
    layout = TokenLayout(2, GRID, prefix, prefix > 0, valid=valid)
    wanted, got = by_reference(module, x, layout), module(x, layout)
    assert taken == [True]
    real = weight.abs().sum(-1) > 0
    torch.testing.assert_close(got[real], wanted[real], atol=2e-5, rtol=2e-5)
    for a, b in zip(gradients(got, module, x, weight), gradients(wanted, module, x, weight)):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_packed_images_equal_each_alone(device: torch.device, taken: list[bool]) -> None:
    """Groups of like length share a call, their buckets of pairs differ by image."""
    counts, prefix = [54, 50, 17, 3], 1
    module = module_of("topk 16 all", RPES[4], prefix).to(device)
    positions = [torch.randperm(54)[:count].sort().values for count in counts]
    x = torch.randn(sum(counts) + 4, HEADS * WIDTH).to(device)
    out = module(x, TokenLayout(4, GRID, prefix, positions=torch.cat(positions).to(device), counts=counts))
    assert taken == [True] * 3
    for rows, own, place in zip(x.split([c + 1 for c in counts]), out.split([c + 1 for c in counts]), positions):
        alone = by_reference(module, rows[None], TokenLayout(1, GRID, prefix, positions=place[None].to(device)))
        torch.testing.assert_close(own, alone[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("length", [16, 17, 65, 197])
def test_any_length_and_nothing_beyond_it(length: int, device: torch.device) -> None:
    """Around the tensors lies NaN: what is read beyond them would show."""
    generator = torch.Generator().manual_seed(length)
    size = 2 * length * 3 * HEADS * 32
    memory = torch.full((size + 20000,), float("nan"), device=device)
    qkv = memory[10000 : 10000 + size].view(2, length, 3, HEADS, 32)
    qkv.copy_(torch.randn(qkv.shape, generator=generator))
    assert qkv.is_contiguous()
    qkv.requires_grad_()
    tables = RPETables(*(None, *(torch.randn(1, 5, 32, generator=generator).to(device) for _ in range(3))))
    ids = torch.randint(5, (length, length), generator=generator).to(device)
    got = fused_attention(qkv, ids, tables, None, (16, None), 0)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    wanted = attend(query, key, value, ids, tables, None, (16, None))[0].transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    slope = torch.randn(got.shape, generator=generator).to(device)
    for a, b in zip(torch.autograd.grad(got, qkv, slope), torch.autograd.grad(wanted, qkv, slope), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_keys_equal_to_the_last_kept_stay_open(device: torch.device) -> None:
    """Scores of a few whole numbers: nearly all are equal to others, and to zero."""
    qkv = torch.randint(-1, 2, (2, 40, 3, 1, 16)).float().to(device)
    qkv[:, :5, 0] = 0  # all their scores are equal
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    for number in (1, 3, 39, 40):
        got = fused_attention(qkv, None, None, None, (number, None), 0)
        wanted = attend(query, key, value, keep=(number, None))[0].transpose(1, 2).flatten(2)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_in_16_bits_scores_and_choice_are_those_of_float32(device: torch.device) -> None:
    qkv = torch.randn(2, 50, 3, HEADS, 32).to(device, torch.float16)
    tables = RPETables(*(None, *(torch.randn(1, 7, 32).to(device) for _ in range(3))))
    tables_16 = RPETables(*(None if t is None else t.half() for t in (None, tables.key, tables.query, tables.value)))
    ids = torch.randint(7, (50, 50)).to(device)
    query, key, value = qkv.float().permute(2, 0, 3, 1, 4)
    got = fused_attention(qkv, ids, tables, None, (50, None), 0)
    assert got.dtype == torch.float16
    wanted = attend(query, key, value, ids, tables, None, (50, None))[0].transpose(1, 2).flatten(2)
    assert (got - wanted).abs().max() < 0.005 * wanted.abs().max()
    again = fused_attention(qkv, ids, tables_16, None, (50, None), 0)
    assert (again - got).abs().max() < 0.005 * wanted.abs().max()


def test_it_is_an_operator_as_pytorch_wants_one(device: torch.device) -> None:
    """Its shapes without data, its gradient under `torch.compile`, nothing changed in place."""
    qkv = torch.randn(2, 20, 3, 1, 16, device=device, requires_grad=True)
    tables = [torch.randn(1, 4, 16, device=device, requires_grad=True) for _ in range(3)]
    ids = torch.randint(4, (1, 20, 20), device=device).short()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    arguments = (qkv, ids, None, *tables, None, None, 5, 1)
    torch.library.opcheck(fused_op.attend_pairs, arguments, test_utils=checks)
    only = (qkv, None, None, None, None, None, torch.rand(2, 20, device=device) > 0.3, None, 0, 0)
    torch.library.opcheck(fused_op.attend_pairs, only, test_utils=checks)


ON_ALL, ON_VALUES = (None, (1, 7, 16), (1, 7, 16), (2, 7, 16)), (None, None, None, (1, 51, 16))
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter has no products of bfloat16


@pytest.mark.parametrize("best", [None, "of all", "by image"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shapes", [ON_ALL, ON_VALUES, ((2, 7), None, None, None), (None,) * 4])
def test_a_trial_passes(
    shapes: tuple[Any, ...], masked: bool, best: str | None, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where an encoder is only applied: the kernels that a layer asks for are tried forward and backward."""
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        assert fused._tried.__wrapped__(device, HALF, 61, 2, 16, shapes, masked, best)
    assert not caplog.records


def test_what_fails_its_trial_is_not_used(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A result that differs, or an error, leaves the other path."""
    arguments = (device, HALF, 37, 2, 16, ON_ALL, False, "of all")
    right = fused_op.attend_pairs

    def wrong(*given: Any) -> tuple[Tensor, ...]:
        out, *rest = right(*given)
        return 1.1 * out, *rest

    monkeypatch.setattr(fused, "attend_pairs", wrong)
    assert not fused._tried.__wrapped__(*arguments)
    assert "fused attention cannot be used here (its results are off by 10 %): a slower path is taken" in caplog.text

    def broken(*_: Any) -> tuple[Tensor, ...]:
        raise LookupError("no such instruction\nand much more")

    monkeypatch.setattr(fused, "attend_pairs", broken)
    assert not fused._tried.__wrapped__(*arguments)
    assert "fused attention cannot be used here (no such instruction): a slower path is taken" in caplog.text


def test_all_keys_kept_though_few_are_best_fails_the_trial(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The trial would see a bar that closes nothing."""
    right = fused_op.attend_pairs
    monkeypatch.setattr(fused, "attend_pairs", lambda *given: right(*given[:8], 61, given[9]))
    assert not fused._tried.__wrapped__(device, HALF, 61, 2, 16, ON_ALL, False, "of all")
    assert "off by" in caplog.text


def test_ids_are_as_short_as_they_may_be() -> None:
    assert fused.short_ids(torch.tensor([[50]]), 51).dtype == torch.int16
    assert fused.short_ids(torch.tensor([[40000]]), 40001).tolist() == [[40000]]


def test_compiled_code_tries_it_too_and_gives_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(fused, "triton_asked", lambda _: True)
    monkeypatch.setattr(fused, "_tried", lambda *asked: tried.append(asked) or True)
    module = module_of("topk 16 all", RPES[4], 1).to(device)
    x = torch.randn(2, 55, HEADS * WIDTH, device=device, requires_grad=True)

    def attend_by(call: Any) -> list[Tensor]:
        out = call(x, TokenLayout(2, GRID, 1))
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    wanted = attend_by(module)
    torch._dynamo.reset()
    got = attend_by(torch.compile(module, backend="aot_eager", fullgraph=True))
    assert len(tried) == 2
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, tables, keep = torch.zeros(1, 5, 3, 1, 16), RPETables(bias=torch.zeros(1, 3)), (2, None)
    assert not fused_pays(qkv, tables, None, keep, 0.0)
    monkeypatch.setenv("CYTOSSL_TRITON_ATTENTION", "1")
    assert not fused_pays(qkv, tables, None, keep, 0.0)  # a CPU
    monkeypatch.setattr(fused, "triton_asked", lambda _: True)
    monkeypatch.setattr(fused, "_right", lambda *_: True)
    assert fused_pays(qkv, tables, None, keep, 0.0)
    assert fused_pays(qkv, None, torch.ones(1, 1, 1, 5) > 0, keep, 0.0)
    assert not fused_pays(qkv, None, None, None, 0.0)  # PyTorch's own is better
    assert not fused_pays(qkv, tables, torch.ones(1, 1, 5, 5) > 0, keep, 0.0)
    assert not fused_pays(qkv, tables, None, keep, 0.1)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not fused_pays(qkv, tables, None, keep, 0.0)
    monkeypatch.undo()
    monkeypatch.setattr(fused, "triton_asked", lambda _: True)
    assert not fused_pays(qkv.expand(1, 5, 3, 1, 16)[..., :8], tables, None, keep, 0.0)
    assert not fused_pays(torch.zeros(1, fused.LONGEST + 1, 3, 1, 16), tables, None, keep, 0.0)


@pytest.mark.slow
def test_compilers_take_the_kernels(tmp_path: Path) -> None:
    """Ahead of time, bf16, heads of 64: registers hold nearly everything."""
    rows = compiled_ahead("fused", tmp_path)
    assert {row["kernel"] for row in rows} == {"attend_rows", "backward_rows", "backward_cols"}
    for row in rows:
        assert row["stack"] <= 256, row
