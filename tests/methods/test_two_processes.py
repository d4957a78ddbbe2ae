"""Two gloo processes with half of the batch each against one process with the joined batch, for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_pair import run_pair
from small_methods import MULTI_CROP, NEEDS_TOKENS, SMALL, small_method
from tiny_encoders import TinyConv, TinyViT, coloured_views
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cytossl_monai.losses.koleo import KoLeoLoss
from cytossl_monai.losses.nt_xent import NTXentLoss
from cytossl_monai.losses.sinkhorn import sinkhorn_knopp
from cytossl_monai.methods.parts.batchnorm import GatherBatchNorm

STEPS = {"vit": 20, "conv": 5}
CASES = [(name, "vit") for name in SMALL] + [(name, "conv") for name in SMALL if name not in NEEDS_TOKENS]


def share(views: dict[str, list[torch.Tensor]], rank: int | None) -> dict[str, list[torch.Tensor]]:
    if rank is None:
        return views
    return {key: [view[rank * 4 : rank * 4 + 4] for view in found] for key, found in views.items()}


def run(name: str, kind: str, rank: int | None) -> dict[str, Any]:
    torch.manual_seed(5)
    # float64: what differs is then the mathematics, not rounding that 20 steps have blown up.
    method = small_method(name, TinyViT() if kind == "vit" else TinyConv()).double()
    wrapped: nn.Module = method if rank is None else DistributedDataParallel(method)
    optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.02, momentum=0.9)
    losses = []
    for step in range(STEPS[kind]):
        views = coloured_views(seed=step, local=2 if name in MULTI_CROP else 0)
        views = {k: [v.double() if v.is_floating_point() else v for v in found] for k, found in views.items()}
        loss = wrapped(share(views, rank))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.update((step + 1) / STEPS[kind])
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "state": method.state_dict()}


def rows(seed: int) -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def losses_and_norm(rank: int | None) -> dict[str, torch.Tensor]:
    """Single parts, in float64."""
    part = slice(None) if rank is None else slice(rank * 4, rank * 4 + 4)
    out: dict[str, torch.Tensor] = {}
    first, second = rows(0)[part].requires_grad_(), rows(1)[part].requires_grad_()
    for label, loss in (("nt_xent", NTXentLoss(0.2)(first, second)), ("koleo", KoLeoLoss()(first))):
        out[label] = loss.detach()
        out[f"{label}_grad"] = torch.autograd.grad(loss, first)[0]
    out["sinkhorn"] = sinkhorn_knopp(rows(2)[part], 0.3)
    # The second process holds fewer rows: 5 and 3.
    uneven = slice(None) if rank is None else (slice(0, 5) if rank == 0 else slice(5, 8))
    norm = GatherBatchNorm(5).double() if rank is not None else nn.BatchNorm1d(5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 6.0))
    batch = rows(3)[uneven].requires_grad_()
    normed = norm(batch)
    (normed * rows(4)[uneven]).sum().backward()
    out |= {"norm": normed.detach(), "norm_grad": batch.grad, "norm_weight_grad": norm.weight.grad}
    out |= {"norm_mean": norm.running_mean, "norm_var": norm.running_var}
    out["sinkhorn_uneven"] = sinkhorn_knopp(rows(2) if rank is None else (rows(2) if rank == 0 else rows(2)[:0]), 0.3)
    return out


def in_each_process(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {f"{name}-{kind}": run(name, kind, rank) for name, kind in CASES}
    results["parts"] = losses_and_norm(rank)
    return results


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("two_processes")
    return run_pair(in_each_process, folder)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_processes_equal_one(name: str, kind: str, pair: list[dict[str, Any]]) -> None:
    expected = run(name, kind, None)
    both = [process[f"{name}-{kind}"] for process in pair]
    joined = (both[0]["losses"] + both[1]["losses"]) / 2
    assert torch.allclose(joined, expected["losses"], atol=1e-8, rtol=0)
    for key, value in expected["state"].items():
        for process in both:
            difference = (process["state"][key] - value).abs().max().item()
            assert difference < 1e-7 * (1 + value.abs().max().item()), key


def test_parts_equal_the_joined_batch(pair: list[dict[str, Any]]) -> None:
    expected, (first, second) = losses_and_norm(None), (process["parts"] for process in pair)
    for label in ("nt_xent", "koleo"):
        assert torch.allclose((first[label] + second[label]) / 2, expected[label], atol=1e-12)
        grads = torch.cat([first[f"{label}_grad"], second[f"{label}_grad"]]) / 2
        assert torch.allclose(grads, expected[f"{label}_grad"], atol=1e-12)
    for label in ("sinkhorn", "norm", "norm_grad"):
        assert torch.allclose(torch.cat([first[label], second[label]]), expected[label], atol=1e-6)
    assert torch.allclose(first["norm_weight_grad"] + second["norm_weight_grad"], expected["norm_weight_grad"])
    for process in (first, second):
        assert torch.allclose(process["norm_mean"], expected["norm_mean"])
        assert torch.allclose(process["norm_var"], expected["norm_var"])
    assert torch.allclose(first["sinkhorn_uneven"], expected["sinkhorn_uneven"], atol=1e-12)
    assert second["sinkhorn_uneven"].shape == (0, 5)
