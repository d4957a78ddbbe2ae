"""TransMIL: correlated MIL with Nystrom attention and pyramid position encoding (Shao et al., NeurIPS 2021)."""

import torch
from torch import Tensor, nn

from cytossl_monai.networks.blocks.nystrom import NystromAttention
from cytossl_monai.networks.mil.base import MILModel, MILOutput

__all__ = ["PPEG", "TransMIL"]


class PPEG(nn.Module):
    """Pyramid position encoding: the tokens, laid out as a square, plus three depth-wise convolutions of it.

    Args:
        dim: width of the tokens.
        kernels: sides of the convolutions, odd.
    """

    def __init__(self, dim: int, kernels: tuple[int, ...] = (7, 5, 3)) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in kernels)

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """(side * side, dim) tokens -> the same shape."""
        square = tokens.T.reshape(1, -1, side, side)
        result = square
        for convolution in self.convolutions:
            result = result + convolution(square)
        return result.reshape(square.shape[1], -1).T


class TransMIL(MILModel):
    """Tiles attend to one another; a class token reads the bag.

    The tiles, repeated from the start to fill a square, pass a Nystrom attention layer, PPEG and a second one. Here
    PPEG works on the square of each bag by itself, so that padding has no part in it.

    **The order of the tiles matters**: it decides which tiles are neighbours in PPEG's square, which landmark a tile
    belongs to, and which tiles fill the square up. In cytology, where cells lie scattered, that neighbourhood means
    little; the bags' order is the tile index's, by rows.

    Attention is that of the class token over the tiles in the last layer, mean over heads, its negative part (the
    pseudo-inverse may give some) cut off, and scaled to sum to one.

    Args:
        in_features: width D of the features.
        n_outputs: number of logits.
        embed_dim: width of the tokens.
        n_heads: attention heads.
        n_landmarks: landmarks of the Nystrom attention.
        dropout: of the attention's output, in training.
    """

    order_matters = True

    def __init__(
        self,
        in_features: int,
        n_outputs: int,
        embed_dim: int = 256,
        n_heads: int = 8,
        n_landmarks: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(in_features, n_outputs)
        self.embed_dim, self.n_heads, self.n_landmarks, self.dropout = embed_dim, n_heads, n_landmarks, float(dropout)
        self.embed = nn.Sequential(nn.Linear(in_features, embed_dim), nn.ReLU())
        self.class_token = nn.Parameter(torch.randn(1, embed_dim) * 0.02)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.layer1 = NystromAttention(embed_dim, n_heads, n_landmarks, dropout=dropout)
        self.position = PPEG(embed_dim)
        self.layer2 = NystromAttention(embed_dim, n_heads, n_landmarks, dropout=dropout)
        self.classifier = nn.Linear(embed_dim, n_outputs)

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        logits, attention = [], torch.zeros(mask.shape, dtype=features.dtype, device=features.device)
        for b in range(len(features)):
            bag_logits, weights = self._bag(features[b][mask[b]])
            logits.append(bag_logits)
            attention[b, mask[b]] = weights
        return MILOutput(torch.stack(logits), attention, None, None, {})

    def _bag(self, features: Tensor) -> tuple[Tensor, Tensor]:
        n = len(features)
        side = int(n**0.5)
        side += side * side < n
        embedded = self.embed(features)
        tiles = torch.cat([embedded, embedded[: side * side - n]]) if side * side > n else embedded
        tokens = torch.cat([self.class_token, tiles])
        present = torch.ones(1, len(tokens), dtype=torch.bool, device=tokens.device)
        tokens = tokens + self.layer1(self.norm1(tokens).unsqueeze(0), present)[0].squeeze(0)
        tokens = torch.cat([tokens[:1], self.position(tokens[1:], side)])
        attended, weights = self.layer2(self.norm2(tokens).unsqueeze(0), present, 1)
        tokens = tokens + attended.squeeze(0)
        assert weights is not None
        # A tile that was repeated to fill the square has both shares.
        shares = weights[0, 0, 1:].detach().clamp(min=0.0)
        attention = shares[:n].clone()
        attention[: side * side - n] += shares[n:]
        total = attention.sum()
        attention = attention / total if float(total) > 0 else torch.full_like(attention, 1.0 / n)
        return self.classifier(self.norm(tokens[0])), attention
