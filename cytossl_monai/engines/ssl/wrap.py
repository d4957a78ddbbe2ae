"""Several processes: set up from what torchrun says, wrapped as DDP or FSDP, taken down again."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cytossl_monai.engines.ssl.accumulation import checkpoint_blocks
from cytossl_monai.methods.base import trained_encoder
from cytossl_monai.utils.distributed import world_size

__all__ = ["prepare", "unwrap", "wrap"]


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
        encoder = trained_encoder(method)
        if encoder is None:
            raise ValueError(f"activation_checkpointing: {type(method).__name__} has no encoder; switch it off")
        checkpoint_blocks(encoder)
    return wrap(method.to(device), strategy, **options)


def unwrap(network: nn.Module) -> nn.Module:
    """The method inside DDP and ``torch.compile``."""
    network = getattr(network, "_orig_mod", network)
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return getattr(network, "_orig_mod", network)
