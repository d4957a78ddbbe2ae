"""The group of processes that torchrun started: who is in it, join, wait, leave."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = [
    "barrier",
    "each_ones",
    "init_distributed",
    "is_distributed",
    "is_main",
    "rank",
    "shutdown_distributed",
    "world_size",
]

_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others, as they do while the first one evaluates (a linear probe of many images):
NCCL would give up after ten minutes. One that has died is noticed by torchrun at once."""


def rank(device: torch.device | None = None) -> int:
    """Number of this process; 0 where there is only one.

    Args:
        device: what ``init_distributed`` gave; not looked at. A configuration names it so that it is made first.
    """
    del device
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size(device: torch.device | None = None) -> int:
    """Number of processes.

    Args:
        device: as for ``rank``.
    """
    del device
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def each_ones(number: int, device: torch.device) -> list[int]:
    """The number that each process gives, in the order of their ranks; all processes must call it.

    Args:
        number: this process'.
        device: that the backend reaches.
    """
    if world_size() == 1:
        return [number]
    numbers = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(numbers, torch.tensor(number, device=device))
    return [int(each) for each in numbers]


def init_distributed(backend: str | None = None) -> torch.device:
    """Join the processes that torchrun started, and say which device this one trains on.

    Args:
        backend: ``"nccl"`` or ``"gloo"``; default: nccl where this process has a GPU of its own, else gloo.

    Returns:
        ``cuda:<LOCAL_RANK>`` or the CPU.

    Raises:
        RuntimeError: when not started by torchrun.
    """
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError(
            "multi_gpu_train.json runs under torchrun: torchrun --nproc_per_node=2 -m monai.bundle run ..."
        )
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available() and local < torch.cuda.device_count() and backend != "gloo"
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(backend or ("nccl" if on_gpu else "gloo"), timeout=_PATIENCE)
    return device


def shutdown_distributed() -> None:
    """Leave the group of processes, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_distributed() -> bool:
    """True when a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
