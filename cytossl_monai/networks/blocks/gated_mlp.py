"""Gated MLPs: what DINOv2's giant and most pathology encoders have where a ViT has two layers and a GELU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from monai.networks.blocks.mlp import MLPBlock
from torch import Tensor, nn

__all__ = ["GATES", "GatedMLP", "make_mlp"]

GATES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "swiglu": (F.silu, True),
    "swiglu_last": (F.silu, False),
    "geglu": (F.gelu, False),
    "glu": (torch.sigmoid, False),
}
"""Kinds of gate: the activation of the gating half, and whether that is the first half of ``linear1``.

``swiglu`` is DINOv2's fused form (``w12``, ``w3``) and timm's ``SwiGLUPacked`` (``GluMlp`` with SiLU and
``gate_last=False``); the others are what timm's ``GluMlp`` computes with its defaults and the activation named.
"""


class GatedMLP(nn.Module):
    """``linear2(act(a) * b)``, where ``a`` and ``b`` are the halves of ``linear1(x)``.

    Shazeer, "GLU Variants Improve Transformer", 2020. Parameters carry the names of MONAI's `MLPBlock`.

    Args:
        hidden_size: width C of the tokens.
        mlp_dim: width of each half; ``linear1`` gives twice that.
        dropout_rate: dropout after the gate and after the second layer, in training only.
        kind: one of `GATES`.
        bias: whether the two layers have a bias.

    Raises:
        ValueError: for another kind.
    """

    def __init__(
        self, hidden_size: int, mlp_dim: int, dropout_rate: float = 0.0, kind: str = "swiglu", bias: bool = True
    ) -> None:
        super().__init__()
        if kind not in GATES:
            raise ValueError(f"A gated MLP is one of {', '.join(GATES)}; got {kind!r}.")
        self.act, self.gate_first = GATES[kind]
        self.linear1 = nn.Linear(hidden_size, 2 * mlp_dim, bias=bias)
        self.linear2 = nn.Linear(mlp_dim, hidden_size, bias=bias)
        self.drop1, self.drop2 = nn.Dropout(dropout_rate), nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        first, second = self.linear1(x).chunk(2, dim=-1)
        gated = self.act(first) * second if self.gate_first else first * self.act(second)
        return self.drop2(self.linear2(self.drop1(gated)))  # type: ignore[no-any-return]


def make_mlp(hidden_size: int, mlp_dim: int, dropout_rate: float = 0.0, kind: str = "gelu") -> nn.Module:
    """The MLP of a transformer block.

    Args:
        hidden_size: width C of the tokens.
        mlp_dim: hidden width; of a gated MLP, of each half.
        dropout_rate: in training only.
        kind: ``gelu`` (two layers, MONAI's `MLPBlock`) or one of `GATES`.

    Raises:
        ValueError: for another kind.
    """
    if kind == "gelu":
        return MLPBlock(hidden_size, mlp_dim, dropout_rate)
    if kind not in GATES:
        raise ValueError(f"mlp_type must be gelu or one of {', '.join(GATES)}; got {kind!r}.")
    return GatedMLP(hidden_size, mlp_dim, dropout_rate, kind)
