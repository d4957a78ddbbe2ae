"""Projectors and predictors: the small networks on top of an encoder that are thrown away after pretraining."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.methods.parts.batchnorm import GatherBatchNorm

__all__ = ["DINOHead", "UnitLinear", "mlp_head"]


def mlp_head(
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    num_layers: int = 2,
    last_norm: bool = False,
    bias: bool = False,
) -> nn.Sequential:
    """Linear, batch normalisation, ReLU, repeated; then a linear layer.

    Args:
        in_dim: width of the input (B, in_dim).
        hidden_dim: width between the layers.
        out_dim: width of the output (B, out_dim).
        num_layers: number of linear layers, at least 1.
        last_norm: normalise the output too, without scale and shift (MoCo v3, SimCLR).
        bias: give the linear layers a bias (BYOL); one that a batch normalisation follows has no effect.

    Raises:
        ValueError: when ``num_layers`` is below 1.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        is_last = index == num_layers - 1
        layers.append(nn.Linear(before, after, bias=bias))
        if not is_last:
            layers += [GatherBatchNorm(after), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(GatherBatchNorm(after, affine=False))
    return nn.Sequential(*layers)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grads[0] * scale, None


class UnitLinear(nn.Module):
    """Linear layer without bias whose rows are prototypes of length one (weight normalisation with its gain at 1).

    Args:
        in_dim: width of the input.
        out_dim: number of prototypes.
        learn_gain: learn a gain per prototype (``norm_last_layer=False`` of DINO); less stable.
    """

    gradient_scale: Tensor

    def __init__(self, in_dim: int, out_dim: int, learn_gain: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        # The norm at the start decides how fast directions turn. The published heads keep PyTorch's init of a linear
        # layer here, uniform in +-1 / sqrt(in_dim): a norm of 1 / sqrt(3).
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.gain = nn.Parameter(torch.ones(out_dim, 1)) if learn_gain else None
        self.register_buffer("gradient_scale", torch.ones(()))
        self.frozen = False  # the same on the host: reading the buffer would wait for the device at every step

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.frozen = not bool(self.gradient_scale)

    def freeze(self, frozen: bool) -> None:
        """Let gradients reach the weights no more, or again.

        They arrive as zeros, not as None: under ``DistributedDataParallel`` every parameter must take part. Before the
        optimiser's step they are to be taken away; see ``SSLMethod.prepare_gradients``.
        """
        self.frozen = bool(frozen)
        self.gradient_scale.fill_(0.0 if frozen else 1.0)

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in_dim) to (B, out_dim): inner products with the prototypes."""
        weight = F.normalize(_ScaleGradient.apply(self.weight, self.gradient_scale), dim=1)
        if self.gain is not None:
            weight = weight * _ScaleGradient.apply(self.gain, self.gradient_scale)
        return F.linear(input, weight)


class DINOHead(nn.Module):
    """MLP, bottleneck on the unit sphere, prototypes: the head of DINO, iBOT and DINOv2.

    Paper: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, appendix C.

    Args:
        in_dim: width of the encoder's output.
        out_dim: number of prototypes ``K``.
        hidden_dim: width of the MLP.
        bottleneck_dim: width before the prototypes.
        num_layers: linear layers before the prototypes.
        learn_gain: see :class:`UnitLinear`.

    Raises:
        ValueError: when ``num_layers`` is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        learn_gain: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if index < num_layers - 1:
                layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers)
        self.last_layer = UnitLinear(bottleneck_dim, out_dim, learn_gain)

    def forward(self, features: Tensor) -> Tensor:
        """Logits over the prototypes.

        Args:
            features: (B, in_dim) float.

        Returns:
            (B, out_dim), cosines in [-1, 1] unless gains are learned.
        """
        # A smaller eps would vanish in half precision.
        return self.last_layer(F.normalize(self.mlp(features), dim=-1, eps=1e-6))
