"""Lookups of relative positions as products: the same numbers and gradients as looking up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cytossl_monai.networks.blocks.attention.dense import attend, pair_spread
from cytossl_monai.networks.blocks.irpe import IRPE, RPEConfig
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention
from cytossl_monai.networks.blocks.token_layout import TokenLayout


def made(rpe: dict[str, object], keep: tuple[int, None] | None, spread: bool) -> list[Tensor]:
    """Output and all gradients of a small case."""
    torch.manual_seed(0)
    irpe = IRPE(RPEConfig.parse({"ratio": 1.0, **rpe}), 8, 2).double()  # type: ignore[arg-type]
    for table in irpe.parameters():
        torch.nn.init.normal_(table)
    layout = TokenLayout(3, (4, 5), 1)
    ids = irpe.pair_buckets(*layout.rows_and_cols(torch.device("cpu")), 1)
    query, key, value = (torch.randn(3, 2, 21, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    pairs = pair_spread(ids, irpe.num_buckets, torch.float64) if spread else None
    out, _ = attend(query, key, value, ids, irpe.tables(), None, keep, 1, spread=pairs)
    gradients = torch.autograd.grad(out.square().sum(), [query, key, value, *irpe.parameters()])
    return [out.detach(), *gradients]


@pytest.mark.parametrize("keep", [None, (5, None)])
@pytest.mark.parametrize("shared_heads", [True, False])
@pytest.mark.parametrize("on", ["k", "q", "v", "qkv"])
def test_products_are_lookups(on: str, shared_heads: bool, keep: tuple[int, None] | None) -> None:
    rpe = {"on": on, "shared_heads": shared_heads}
    for looked_up, multiplied in zip(made(rpe, keep, False), made(rpe, keep, True), strict=True):
        torch.testing.assert_close(multiplied, looked_up, rtol=1e-12, atol=1e-12)


def test_is_a_table_of_zeros_and_ones_as_wide_as_products_want() -> None:
    ids = torch.tensor([[0, 2, 1], [2, 2, 0]])
    spread = pair_spread(ids, 3, torch.bfloat16)
    assert spread is not None
    assert spread.shape == (2, 3, 8)
    assert torch.equal(spread.argmax(-1), ids)
    assert torch.equal(spread.sum(-1), torch.ones(2, 3, dtype=torch.bfloat16))


def test_is_not_made_where_images_differ_or_for_very_many_tokens() -> None:
    assert pair_spread(torch.zeros(2, 1, 3, 3, dtype=torch.long), 5, torch.float32) is None
    assert pair_spread(torch.zeros(1, dtype=torch.long).expand(3000, 3000), 49, torch.float32) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["bias", "contextual"])
@pytest.mark.parametrize("sparsity", ["none", "topk", "routed"])
def test_attention_on_cuda_is_the_cpus(sparsity: str, mode: str) -> None:
    torch.set_float32_matmul_precision("highest")
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        module = SparseAttention(64, 2, rpe={"mode": mode, "on": "qkv"}, sparsity=sparsity, num_salient=5, window=1)
        assert module.irpe is not None
        for table in module.irpe.parameters():
            torch.nn.init.normal_(table, std=0.3)
        x = torch.randn(2, 26, 64)
        module, x = module.to(device), x.to(device).requires_grad_()
        out = module(x, TokenLayout(2, (5, 5), 1))
        out.square().sum().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        results.append([part.detach().cpu() for part in (out, x.grad, *gradients) if part is not None])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
