"""The FlexAttention path against the plain reference: what it computes of a pair, and which blocks it visits."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_sparse_attention import HEADS, RPES, WIDTH, by_reference, gradients, make
from torch import Tensor

from cytossl_monai.networks.blocks.attention import flex as attention_flex
from cytossl_monai.networks.blocks.attention.flex import flex_pays, flex_routed_attention, make_plan
from cytossl_monai.networks.blocks.irpe import RPEConfig
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention
from cytossl_monai.networks.blocks.token_layout import TokenLayout

GRID, PREFIX = (9, 6), 2
ON_SCORES = [rpe for rpe in RPES if rpe is None or "v" not in rpe.get("on", "k")]
ON_SCORES += [{"method": "cross", "on": "qk"}, {"method": "euclid", "mode": "bias", "on": "q", "shared_heads": False}]


def without_kernel(query, key, value, score_mod=None, block_mask=None, kernel_options=None):  # type: ignore[no-untyped-def]
    """What `flex_attention` is defined to compute, dense: autograd works on it on a CPU, where the kernel has none."""
    q_index, k_index = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
    heads = torch.arange(query.shape[1]).view(-1, 1, 1)
    score = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5)[0]
    zero = torch.zeros((), dtype=torch.long)
    if score_mod is not None:
        score = score_mod(score, zero, heads, q_index, k_index)
    seen = block_mask.mask_mod(zero, heads, q_index, k_index)
    visited = block_mask.to_dense()[0, 0].bool()
    block = attention_flex.BLOCK
    visited = visited.repeat_interleave(block, 0).repeat_interleave(block, 1)[: seen.shape[-2], : seen.shape[-1]]
    return (score.masked_fill(~(seen & visited), float("-inf")).softmax(-1) @ value[0]).unsqueeze(0)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that small grids have some that are not visited; the definition in the kernel's place."""
    monkeypatch.setattr(attention_flex, "BLOCK", 8)
    monkeypatch.setattr(attention_flex, "flex_attention", without_kernel)


def by_flex(module: SparseAttention, x: Tensor, layout: TokenLayout) -> Tensor:
    rows = module.qkv(x).unflatten(-1, (3, HEADS, module.head_dim)).reshape(-1, 3, HEADS, module.head_dim)
    out = flex_routed_attention(*rows.unbind(1), layout, module.irpe, module.window, module.num_salient)
    return module.out_proj(out.flatten(1)).view(x.shape)


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("rpe", ON_SCORES)
def test_equals_reference(rpe: object, prefix: int, masked: bool) -> None:
    module = make("routed", rpe, prefix)
    valid = None
    if masked:
        valid = torch.rand(2, 54) > 0.4
        valid[0] = False
        valid[0, 10:14] = True  # fewer patches than are salient
    x = torch.randn(2, prefix + 54, HEADS * WIDTH, requires_grad=True)
    weight = torch.randn(2, prefix + 54, HEADS * WIDTH)
    if valid is not None:
        weight[:, prefix:] *= valid.unsqueeze(-1)
    layout = TokenLayout(2, GRID, prefix, prefix > 0, valid=valid)
    wanted, got = by_reference(module, x, layout), by_flex(module, x, layout)
    real = weight.abs().sum(-1) > 0
    torch.testing.assert_close(got[real], wanted[real], atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients(got, module, x, weight), gradients(wanted, module, x, weight)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("rpe", ON_SCORES[:3])
def test_packed_equals_each_image_alone(rpe: object) -> None:
    counts = [54, 3, 17, 1]
    module = make("routed", rpe, PREFIX)
    positions = [torch.randperm(54)[:count].sort().values for count in counts]
    x = torch.randn(sum(counts) + PREFIX * len(counts), HEADS * WIDTH)
    layout = TokenLayout(len(counts), GRID, PREFIX, positions=torch.cat(positions), counts=counts)
    alone = []
    for (start, stop), own in zip(pairwise(layout.offsets()), positions):
        single = TokenLayout(1, GRID, PREFIX, positions=own.unsqueeze(0))
        alone.append(by_reference(module, x[start:stop].unsqueeze(0), single)[0])
    torch.testing.assert_close(by_flex(module, x, layout), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_visits_few_blocks() -> None:
    """64 x 64 patches: a block is two rows of the grid, its window eight: five blocks, and the salient ones."""
    layout = TokenLayout(2, (64, 64), 1)
    plan = make_plan(layout, window=3, num_salient=32, device=torch.device("cpu"))
    visited = plan.blocks.kv_num_blocks[0, 0]
    assert visited.shape == (64,)
    assert visited.max() <= 7
    assert plan.blocks.shape[-2:] == (2 * 4096, 2 * 4096 + 2 * 33)


def test_the_real_kernels_forward_on_a_cpu() -> None:
    """FlexAttention itself, as far as a CPU has it: forward, uncompiled."""
    module = make("routed", {"mode": "contextual"}, 1)
    x = torch.randn(2, 1 + 196, HEADS * WIDTH)
    layout = TokenLayout(2, (14, 14), 1)
    with torch.no_grad():
        torch.testing.assert_close(by_flex(module, x, layout), by_reference(module, x, layout), atol=1e-5, rtol=1e-5)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """FlexAttention by inductor's kernel for the CPU: made from the same score and mask functions as Triton's."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler here: inductor cannot make kernels for the CPU")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(attention_flex, "flex_attention", torch.compile(attention_flex.flex_attention))


@pytest.mark.usefixtures("compiled")
def test_the_compiled_kernel_forward_on_a_cpu() -> None:
    module = make("routed", {"mode": "contextual", "on": "qk"}, 1)
    x = torch.randn(2, 1 + 196, HEADS * WIDTH)
    layout = TokenLayout(2, (14, 14), 1)
    with torch.no_grad():
        torch.testing.assert_close(by_flex(module, x, layout), by_reference(module, x, layout), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("compiled")
def test_the_compiled_kernel_backward_on_a_cpu() -> None:
    """Until PyTorch has one, gradients are held by the definition in the kernel's place (`test_equals_reference`)."""
    module = make("routed", {"mode": "contextual", "on": "qk"}, 1)
    x, weight = torch.randn(2, 2, 1 + 196, HEADS * WIDTH)
    layout = TokenLayout(2, (14, 14), 1)
    x.requires_grad_()
    try:
        got = by_flex(module, x, layout)
    except NotImplementedError as error:
        pytest.skip(f"PyTorch {torch.__version__}: {error}")
    for a, b in zip(gradients(got, module, x, weight), gradients(by_reference(module, x, layout), module, x, weight)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_is_taken_only_where_it_can_do_what_is_asked() -> None:
    module = make("routed", {"mode": "contextual"}, 1)
    assert not flex_pays(torch.zeros(3, 2, 64), module.irpe, 0.0)  # a CPU


def test_its_kernels_are_tried_in_inference_mode_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial goes backward; where an encoder was only applied that failed, and the tiles were taken for good."""
    monkeypatch.setattr(attention_flex, "flex_attention", without_kernel)
    with torch.inference_mode():
        assert attention_flex._can_be_built.__wrapped__(torch.device("cpu"), torch.float32, 2, 16, RPEConfig())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rpe", [None, {"mode": "bias"}, {"mode": "contextual", "on": "qk"}])
def test_on_cuda(rpe: object, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernel against the tiles, which the other tests hold to the reference; forward and gradient."""
    torch.set_float32_matmul_precision("highest")
    module = SparseAttention(128, 2, rpe=rpe, sparsity="routed", window=3, num_salient=16).cuda()  # type: ignore[arg-type]
    if module.irpe is not None:
        for table in module.irpe.parameters():
            torch.nn.init.normal_(table, std=0.2)
    counts = [900, 17, 1500] if packed else None
    batch, side = (3, 48) if packed else (2, 48)
    positions = None
    if counts is not None:
        positions = torch.cat([torch.randperm(side * side)[:n].sort().values for n in counts]).cuda()
    rows = sum(counts) + 3 if counts is not None else 2 * (side * side + 1)
    x = torch.randn(rows, 128, device="cuda")
    x = (x if packed else x.view(2, -1, 128)).requires_grad_()
    outputs, grads = [], []
    for switch in ("1", "0"):
        monkeypatch.setenv("CYTOSSL_FLEX_ATTENTION", switch)
        layout = TokenLayout(batch, (side, side), 1, positions=positions, counts=counts)
        with torch.autocast("cuda", torch.bfloat16):
            out = module(x, layout)
        outputs.append(out.float())
        grads.append(torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()]))
    scale = 0.03
    assert (outputs[0] - outputs[1]).abs().mean() < scale * outputs[1].abs().mean()
    for a, b in zip(*grads):
        assert (a - b).abs().mean() <= 3 * scale * b.abs().mean() + 1e-7
