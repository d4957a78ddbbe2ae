"""Several processes: set up from what torchrun says, wrapped as DDP or FSDP, taken down again."""

from __future__ import annotations

import inspect
import os
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cytossl_monai.engines.accumulation import checkpoint_blocks

__all__ = [
    "barrier",
    "init_distributed",
    "is_main",
    "prepare",
    "rank",
    "shutdown_distributed",
    "unwrap",
    "world_size",
    "wrap",
]


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
        dist.init_process_group(backend or ("nccl" if on_gpu else "gloo"))
    return device


def shutdown_distributed() -> None:
    """Leave the group of processes, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wrap(
    method: nn.Module,
    strategy: Literal["ddp", "fsdp"] = "ddp",
    find_unused_parameters: bool = False,
    **options: Any,
) -> nn.Module:
    """Share a method's training among all processes; alone, it is returned as it is.

    Args:
        method: the method, on its device.
        strategy: ``"ddp"``: every process holds everything, gradients are averaged. ``"fsdp"``: weights, gradients and
            optimiser state of the encoders are shared out (for encoders that do not fit one GPU).
        find_unused_parameters: for networks with parameters that a step does not touch (MONAI's own ``ViT``).
        options: further arguments of ``DistributedDataParallel`` or ``fully_shard``.

    Raises:
        ValueError: for an unknown strategy.
    """
    if strategy not in ("ddp", "fsdp"):
        raise ValueError(f"unknown strategy {strategy!r}; choose ddp or fsdp")
    if world_size() == 1:
        return method
    if strategy == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for name, module in method.named_modules():
            if name.rsplit(".", 1)[-1] == "blocks" and isinstance(module, nn.ModuleList):
                for block in module:
                    fully_shard(block, **options)
        fully_shard(method, **options)
        return method
    device = next(method.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    # Teachers and running statistics move alike in all processes, and batch normalisation synchronises by itself.
    options.setdefault("forward_sync_buffers" if _renamed() else "broadcast_buffers", False)
    return DistributedDataParallel(method, device_ids=ids, find_unused_parameters=find_unused_parameters, **options)


def _renamed() -> bool:
    """Whether this PyTorch knows ``broadcast_buffers`` by its new name."""
    return "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters


def prepare(
    method: nn.Module,
    device: torch.device | str,
    strategy: Literal["ddp", "fsdp"] = "ddp",
    activation_checkpointing: bool = False,
    **options: Any,
) -> nn.Module:
    """Put a method on its device, switch activation checkpointing on, and wrap it for several processes.

    Args:
        method: the method.
        device: where it trains.
        strategy: see ``wrap``.
        activation_checkpointing: recompute the encoder's blocks in the backward pass: less memory, more time.
        options: further arguments of ``wrap``.
    """
    if activation_checkpointing:
        encoder: Any = method.encoder
        checkpoint_blocks(encoder)
    return wrap(method.to(device), strategy, **options)


def unwrap(network: nn.Module) -> nn.Module:
    """The method inside DDP and ``torch.compile``."""
    network = getattr(network, "_orig_mod", network)
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return getattr(network, "_orig_mod", network)
