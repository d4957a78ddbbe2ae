"""The transformer block of the SR-Transformer: attention and MLP, each normed before and added after."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cytossl_monai.networks.blocks.gated_mlp import make_mlp
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention
from cytossl_monai.networks.blocks.token_layout import TokenLayout

__all__ = ["DropPath", "LayerScale", "SRBlock"]


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is left out with probability ``rate``, else scaled up.

    Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.

    Args:
        rate: probability in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate must lie in [0, 1); got {rate}.")
        self.rate = rate

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Drop by image: ``x`` is (B, L, C), or (rows, C) where the layout is packed."""
        if self.rate == 0 or not self.training:
            return x
        kept = torch.rand(layout.batch, device=x.device).ge(self.rate).to(x.dtype) / (1 - self.rate)
        if layout.counts is None:
            return x * kept.view(-1, 1, 1)
        lengths = torch.tensor([layout.num_prefix + count for count in layout.counts], device=x.device)
        return x * kept.repeat_interleave(lengths).unsqueeze(1)


class LayerScale(nn.Module):
    """A learned factor a channel (Touvron et al., "Going deeper with Image Transformers", ICCV 2021).

    Args:
        width: number of channels.
        start: value at the start.
    """

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last axis."""
        return x * self.gamma


class SRBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``. Parameters carry the names of MONAI's TransformerBlock.

    Args:
        attention: the attention module.
        hidden_size: width C.
        mlp_dim: hidden width of the MLP.
        dropout_rate: dropout inside the MLP.
        drop_path: probability of leaving a branch out in training.
        layer_scale: start of the learned factors, or None for none.
        norm_eps: epsilon of the layer norms.
        mlp_type: ``gelu``, or a gated MLP, see `GatedMLP`.
    """

    def __init__(
        self,
        attention: SparseAttention,
        hidden_size: int,
        mlp_dim: int,
        dropout_rate: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
        mlp_type: str = "gelu",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.mlp = make_mlp(hidden_size, mlp_dim, dropout_rate, mlp_type)
        self.scale1: nn.Module = nn.Identity() if layer_scale is None else LayerScale(hidden_size, layer_scale)
        self.scale2: nn.Module = nn.Identity() if layer_scale is None else LayerScale(hidden_size, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Run the block on (B, L, C), or (rows, C) where the layout is packed."""
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x), layout)), layout)
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))), layout)
