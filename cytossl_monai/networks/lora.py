"""LoRA: train a large network by low-rank changes of its matrices (Hu et al., ICLR 2022)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["LowRank", "add_lora", "has_lora", "merge_lora"]

Net = TypeVar("Net", bound=nn.Module)


class LowRank(nn.Module):
    """The change ``scale * up @ down`` of a matrix, zero at the start.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        rank: of the change.
        scale: factor of the change.
    """

    def __init__(self, rows: int, columns: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed matrix."""
        return weight + self.scale * (self.up @ self.down)


def add_lora(
    network: Net,
    rank: int = 8,
    alpha: float = 16.0,
    layers: Sequence[str] = ("qkv", "out_proj"),
    train: Sequence[str] = ("norm",),
) -> Net:
    """Freeze a network and let some of its linear layers change by a low rank; it computes at first what it did.

    What is trained is a small part of the weights: continued pretraining of a published ViT then fits a small GPU (the
    optimiser holds nothing for frozen weights) and stays near to what was published. ``save_encoder`` and the bundle's
    export write the merged weights, so that the file is an encoder as any other.

    Args:
        network: changed in place.
        rank: of the changes, at least 1.
        alpha: the change is scaled by ``alpha / rank``.
        layers: names of the linear layers (an SR-Transformer has ``qkv``, ``out_proj``, ``linear1``, ``linear2``).
        train: parameters whose name holds one of these are trained as a whole: norms cost little. Tables of relative
            positions are new to a published ViT: add ``table`` to train them.

    Returns:
        ``network``.

    Raises:
        ValueError: for a rank below 1, or where no layer has such a name.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1, got {rank}")
    chosen = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in layers
    ]
    if not chosen:
        names = sorted({n.rpartition(".")[2] for n, m in network.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"no linear layer is named {', '.join(layers)}; this network has {', '.join(names)}")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(part in name for part in train))
    for _, module in chosen:
        change = LowRank(module.out_features, module.in_features, rank, alpha / rank)
        parametrize.register_parametrization(module, "weight", change.to(module.weight))
        module.get_parameter("parametrizations.weight.original").requires_grad_(False)
    return network


def has_lora(network: nn.Module) -> bool:
    """Whether any layer of it changes by a low rank."""
    return any(isinstance(module, LowRank) for module in network.modules())


def merge_lora(network: Net) -> Net:
    """A copy with the changes added to the matrices: the plain network, that computes the same."""
    merged = copy.deepcopy(network)
    for parent in list(merged.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
                setattr(parent, name, _plain(module))
    return merged


@torch.no_grad()
def _plain(module: nn.Linear) -> nn.Linear:
    # PyTorch's own way to take a parametrization off changes the class, which a copy shares with the original.
    weight = module.weight
    plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, weight.device, weight.dtype)
    plain.weight.copy_(weight)
    if module.bias is not None:
        plain.bias.copy_(module.bias)
    return plain.train(module.training)
