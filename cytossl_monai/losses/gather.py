"""Collectives that carry gradients, so that a loss over several processes equals the loss over the joined batch.

With ``W`` processes, each holding an equal share of the batch, and losses averaged over local samples,
``DistributedDataParallel`` averages the gradients of the ``W`` losses. Both functions here send gradients back to the
process that made the tensor, hence that average is the gradient of the mean loss over the joined batch, exactly.
Without a process group (or with one process) they cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cytossl_monai.utils.distributed import is_distributed

__all__ = ["all_reduce_sum", "gather"]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.share = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every process used every row: the gradient of a local row is the sum over the processes.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.share
        return total[start : start + ctx.share]


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def gather(local: Tensor) -> Tensor:
    """Rows of all processes, in order of rank, with gradients.

    Args:
        local: (B, ...) rows of this process. B must be the same in every process (let the sampler drop the rest).

    Returns:
        (W * B, ...) in the same dtype; rows ``rank * B`` to ``(rank + 1) * B`` are the local ones. ``local`` itself
        when there is one process.
    """
    return _Gather.apply(local) if is_distributed() else local


def all_reduce_sum(local: Tensor) -> Tensor:
    """Sum of ``local`` over all processes, with gradients; ``local`` itself when there is one process.

    Args:
        local: any shape, the same in every process; a floating dtype that the backend can add (float32 always can).
    """
    return _AllReduceSum.apply(local) if is_distributed() else local
