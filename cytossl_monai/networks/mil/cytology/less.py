"""LESS: a cross-attention classifier over two scales, made for cytology (Zhao et al., Medical Image Analysis 2024)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cytossl_monai.networks.mil.base import MILModel, MILOutput, masked_softmax

__all__ = ["LESS"]


class TokenAttention(nn.Module):
    """Multi-head attention of some tokens to others, padding left out.

    Args:
        dim: width of the tokens.
        n_heads: attention heads.
        dropout: of the weights, in training.
    """

    def __init__(self, dim: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"embed_dim must be divisible by n_heads, got {dim} and {n_heads}")
        self.n_heads = n_heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, asking: Tensor, asked: Tensor, mask: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            asking: (B, Q, C).
            asked: (B, L, C).
            mask: (B, L) bool, True on tokens.
            need_weights: whether the weights are wanted; without them nothing of size Q x L need be kept.

        Returns:
            (B, Q, C), and the weights (B, Q, L), mean over the heads (empty where not wanted).
        """
        query, key, value = (
            part.unflatten(-1, (self.n_heads, part.shape[-1] // self.n_heads)).transpose(1, 2)
            for part in (self.query(asking), self.key(asked), self.value(asked))
        )
        seen = mask[:, None, None, :]
        weights = query.new_zeros(0)
        if need_weights:
            shares = masked_softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, seen)
            attended = self.dropout(shares) @ value
            weights = shares.mean(dim=1)
        else:
            drop = self.dropout.p if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=drop)
        return self.out(attended.transpose(1, 2).flatten(2)), weights


class Layer(nn.Module):
    """A transformer layer, normed before attention and MLP."""

    def __init__(self, dim: int, n_heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = TokenAttention(dim, n_heads, dropout)
        width = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(dim, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, dim), nn.Dropout(dropout)
        )

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, mask)[0]
        return tokens + self.mlp(self.norm2(tokens))


class CrossClass(nn.Module):
    """The class token of one branch reads the tiles of the other and comes back.

    Chen et al., "CrossViT", ICCV 2021: the token is mapped into the other branch's space, joins its tiles there, asks
    all of them, and is mapped back. Only this one token asks, so the cost grows with the bag, not with its square.
    """

    def __init__(self, dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.there = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.back = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)
        self.attention = TokenAttention(dim, n_heads, dropout)

    def forward(self, own: Tensor, other: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """New class token (B, 1, C) of ``own`` (B, 1 + N, C), and what it gave each tile of ``other``: (B, N)."""
        visitor = self.there(own[:, :1])
        joined = self.norm(torch.cat([visitor, other[:, 1:]], dim=1))
        read, weights = self.attention(joined[:, :1], joined, mask, True)
        return own[:, :1] + self.back(visitor + read), weights[:, 0, 1:]


class Block(nn.Module):
    """Each scale through layers of its own, then the class tokens exchanged."""

    def __init__(self, dim: int, n_heads: int, depths: Sequence[int], mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.ModuleList(Layer(dim, n_heads, mlp_ratio, dropout) for _ in range(depth)) for depth in depths
        )
        self.cross = nn.ModuleList(CrossClass(dim, n_heads, dropout) for _ in depths)

    def forward(self, first: Tensor, second: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both scales' tokens (B, 1 + N, C) and attention (B, N), the mean of what the two class tokens gave."""
        tokens = [first, second]
        for number, scale in enumerate(self.scales):
            for layer in scale.children():
                tokens[number] = layer(tokens[number], mask)
        first_class, to_second = self.cross[0](tokens[0], tokens[1], mask)
        second_class, to_first = self.cross[1](tokens[1], tokens[0], mask)
        first = torch.cat([first_class, tokens[0][:, 1:]], dim=1)
        second = torch.cat([second_class, tokens[1][:, 1:]], dim=1)
        return first, second, 0.5 * (to_first + to_second)


class LESS(MILModel):
    """Two scales of the same places, a transformer each, that talk to one another through their class tokens.

    A tile's feature holds two halves: of the tile (256 px in the paper) and of its centre at twice the magnification
    (the central 128 px). Each half enters by a linear map. In every block a scale passes its own pre-norm layers, then
    its class token reads the other scale's tiles. The logits of the two class tokens are averaged. There are no
    positions: cells lie scattered, and the order of the tiles does not matter.

    Written from the paper's description; where it is silent (widths, the maps around the exchange) this follows
    CrossViT (Chen et al., ICCV 2021), on which it builds. In the paper the features come from VPU learning
    (:class:`cytossl_monai.methods.vpu.VPU`); those of any encoder serve.

    Attention is what the two class tokens gave the tiles in the last exchange, mean over scales and heads, scaled to
    sum to one. Time grows with the square of the bag: take ``max_tiles`` of some thousands.

    Args:
        in_features: width 2 D of the features: those of the tile, then those of its centre.
        n_outputs: number of logits.
        embed_dim: width of the tokens.
        n_heads: attention heads.
        n_blocks: blocks, each ending with an exchange.
        depths: layers a block, of the tile's scale and of its centre's.
        mlp_ratio: hidden width of a layer's MLP, as a multiple of ``embed_dim``.
        dropout: in training.
        feature_scales: how many scales the feature file says it holds; None where it does not say.

    Raises:
        ValueError: for features of one scale, and for numbers out of range.
    """

    def __init__(
        self,
        in_features: int,
        n_outputs: int,
        embed_dim: int = 192,
        n_heads: int = 4,
        n_blocks: int = 3,
        depths: Sequence[int] = (1, 4),
        mlp_ratio: float = 2.0,
        dropout: float = 0.1,
        feature_scales: int | None = None,
    ) -> None:
        super().__init__(in_features, n_outputs)
        if in_features % 2 or (feature_scales is not None and feature_scales != 2):
            raise ValueError(
                f"LESS reads two scales, side by side in one feature of even width; these have {in_features} numbers "
                f"of {feature_scales or 'one'} scale(s): embed the slides with two_scales on, or take another method"
            )
        if n_blocks < 1 or len(depths) != 2 or min(depths) < 1:
            raise ValueError(f"n_blocks and both depths must be at least 1, got {n_blocks} and {list(depths)}")
        self.embed_dim, self.n_heads, self.n_blocks, self.feature_scales = embed_dim, n_heads, n_blocks, feature_scales
        self.depths, self.mlp_ratio, self.dropout = [int(depth) for depth in depths], float(mlp_ratio), float(dropout)
        half = in_features // 2
        self.embed = nn.ModuleList(nn.Linear(half, embed_dim) for _ in range(2))
        self.class_tokens = nn.Parameter(torch.randn(2, 1, 1, embed_dim) * 0.02)
        self.blocks = nn.ModuleList(
            Block(embed_dim, n_heads, self.depths, self.mlp_ratio, self.dropout) for _ in range(n_blocks)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(2))
        self.classifiers = nn.ModuleList(nn.Linear(embed_dim, n_outputs) for _ in range(2))

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        batch = features.shape[0]
        seen = torch.cat([mask.new_ones(batch, 1), mask], dim=1)
        first, second = (
            torch.cat([token.expand(batch, -1, -1), embed(half)], dim=1)
            for token, embed, half in zip(self.class_tokens, self.embed, features.chunk(2, dim=-1))
        )
        weights = features.new_zeros(mask.shape)
        for block in self.blocks:
            first, second, weights = block(first, second, seen)
        logits = 0.5 * sum(
            classifier(norm(tokens[:, 0]))
            for tokens, norm, classifier in zip((first, second), self.norms, self.classifiers)
        )
        attention = weights.detach() / weights.detach().sum(dim=1, keepdim=True).clamp_min(1e-12)
        return MILOutput(logits, attention, None, None, {})
