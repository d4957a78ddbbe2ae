"""Attention on a CUDA device against the CPU's, forward and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cytossl_monai.networks.blocks import sparse_attention
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention
from cytossl_monai.networks.blocks.token_layout import TokenLayout


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [(6, 6), (14, 14)])
def test_published_attention_in_kernels_is_that_of_operations(
    tokens: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 under autocast against float32, all keys kept: which are best may differ among nearly equal ones."""
    pytest.importorskip("triton", reason="needs Triton")
    torch.set_float32_matmul_precision("highest")
    count = tokens[0] * tokens[1] + 1
    module = SparseAttention(128, 2, rpe={"on": "qkv"}, sparsity="topk", num_keys=count - 1, sparse_prefix=True).cuda()
    assert module.irpe is not None
    for table in module.irpe.parameters():
        torch.nn.init.normal_(table, std=0.3)
    x = torch.randn(3, count, 128, device="cuda", requires_grad=True)
    valid = torch.rand(3, count - 1, device="cuda") > 0.3
    results, taken = [], []
    pays = sparse_attention.fused_pays

    def watched(*given: Any) -> bool:
        taken.append(pays(*given))
        return taken[-1]

    monkeypatch.setattr(sparse_attention, "fused_pays", watched)
    for switch in ("1", "0"):
        monkeypatch.setenv("CYTOSSL_TRITON_ATTENTION", switch)
        with torch.autocast("cuda", torch.bfloat16, enabled=switch == "1"):
            out = module(x, TokenLayout(3, tokens, 1, valid=valid)).float()
        real = out[:, 1:][valid]
        results.append([real, *torch.autograd.grad(real.square().sum(), [x, *module.parameters()])])
    assert taken == [True, False]
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).abs().mean() <= 0.03 * wanted.abs().mean() + 1e-7
