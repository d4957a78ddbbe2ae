"""Two processes against one: values and gradients of the collectives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gloo_pair import run_pair

from cytossl_monai.losses.gather import all_reduce_sum, gather
from cytossl_monai.losses.info_nce import InfoNCELoss
from cytossl_monai.utils.distributed import rank as process_rank, world_size


def rows(seed: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_each_process(rank: int) -> dict[str, torch.Tensor]:
    local = rows(0)[rank * 4 : rank * 4 + 4].clone().requires_grad_()
    everything = gather(local)
    # Each process weighs the rows in its own way, as each has its own loss.
    (everything * rows(1 + rank)).sum().backward()
    summed = rows(0)[rank * 4 : rank * 4 + 4].clone().requires_grad_()
    (all_reduce_sum(summed) * rows(3 + rank)[:4]).sum().backward()
    queries = rows(5)[rank * 4 : rank * 4 + 4].clone().requires_grad_()
    keys = rows(6)[rank * 4 : rank * 4 + 4].clone().requires_grad_()
    loss = InfoNCELoss(0.2)(queries, keys)
    loss.backward()
    assert (world_size(), process_rank()) == (2, rank)
    return {
        "gathered": everything.detach(),
        "gather_grad": local.grad,
        "reduce_grad": summed.grad,
        "loss": loss.detach(),
        "query_grad": queries.grad,
        "key_grad": keys.grad,
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    folder: Path = tmp_path_factory.mktemp("gather")
    return run_pair(in_each_process, folder)


def test_one_process_is_left_alone() -> None:
    tensor = torch.randn(3, 2)
    assert gather(tensor) is tensor
    assert all_reduce_sum(tensor) is tensor
    assert (world_size(), process_rank()) == (1, 0)


def test_gather_joins_in_order_of_rank(pair: list[dict[str, torch.Tensor]]) -> None:
    for result in pair:
        assert torch.equal(result["gathered"], rows(0))


def test_gradients_come_home(pair: list[dict[str, torch.Tensor]]) -> None:
    found = torch.cat([result["gather_grad"] for result in pair])
    assert torch.allclose(found, rows(1) + rows(2), atol=1e-14)
    for result in pair:
        assert torch.allclose(result["reduce_grad"], rows(3)[:4] + rows(4)[:4], atol=1e-14)


def test_info_nce_of_two_processes_equals_the_joined_batch(pair: list[dict[str, torch.Tensor]]) -> None:
    queries, keys = rows(5).requires_grad_(), rows(6).requires_grad_()
    loss = InfoNCELoss(0.2)(queries, keys)
    loss.backward()
    assert torch.allclose((pair[0]["loss"] + pair[1]["loss"]) / 2, loss.detach(), atol=1e-14)
    # DDP takes the mean over processes, hence the half.
    assert torch.allclose(torch.cat([r["query_grad"] for r in pair]) / 2, queries.grad, atol=1e-14)
    assert torch.allclose(torch.cat([r["key_grad"] for r in pair]) / 2, keys.grad, atol=1e-14)
