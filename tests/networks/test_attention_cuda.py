"""Attention on a CUDA device against the CPU's, forward and gradients."""

from __future__ import annotations

import pytest
import torch

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
