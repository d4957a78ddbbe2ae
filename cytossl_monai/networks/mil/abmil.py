"""Attention-based MIL (Ilse et al., ICML 2018), plain and gated."""

import torch
from torch import Tensor, nn

from cytossl_monai.networks.mil.base import MILModel, MILOutput, masked_softmax

__all__ = ["ABMIL", "AttentionScore"]


class AttentionScore(nn.Module):
    """One unnormalised attention score a tile and head.

    Plain: ``w . tanh(V h)``. Gated: ``w . (tanh(V h) * sigmoid(U h))`` (Ilse et al., 2018, equations 8 and 9).

    Args:
        in_features: width of the tile embedding h.
        hidden: width of V h.
        n_heads: number of scores a tile.
        gated: whether to gate.
        dropout: probability of dropping a hidden unit in training.
    """

    def __init__(
        self, in_features: int, hidden: int = 128, n_heads: int = 1, gated: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.value = nn.Linear(in_features, hidden)
        self.gate = nn.Linear(in_features, hidden) if gated else None
        self.dropout = nn.Dropout(dropout)
        self.weight = nn.Linear(hidden, n_heads)

    def forward(self, embedding: Tensor) -> Tensor:
        """Scores (B, N, n_heads) of embeddings (B, N, in_features)."""
        hidden = torch.tanh(self.value(embedding))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(embedding))
        return self.weight(self.dropout(hidden))


class ABMIL(MILModel):
    """Attention-based MIL: the bag is the attention-weighted mean of its embedded tiles.

    ``h = ReLU(W x)``, ``a = softmax(score(h))``, ``logits = classifier(sum a_i h_i)``. The order of the tiles does not
    matter. Tile scores are the classifier's logits of each embedded tile (their attention-weighted mean is the bag's).

    Args:
        in_features: width D of the features.
        n_outputs: number of logits.
        embed_dim: width of h.
        attention_dim: hidden width of the attention.
        gated: gated attention (the default), else plain.
        dropout: of the embedded tiles and of the attention's hidden units, in training.
        feature_dropout: of the features before the embedding, in training.
    """

    def __init__(
        self,
        in_features: int,
        n_outputs: int,
        embed_dim: int = 256,
        attention_dim: int = 128,
        gated: bool = True,
        dropout: float = 0.25,
        feature_dropout: float = 0.1,
    ) -> None:
        super().__init__(in_features, n_outputs)
        self.embed_dim, self.attention_dim, self.gated = embed_dim, attention_dim, gated
        self.dropout, self.feature_dropout = float(dropout), float(feature_dropout)
        self.embed = nn.Sequential(
            nn.Dropout(feature_dropout), nn.Linear(in_features, embed_dim), nn.ReLU(), nn.Dropout(dropout)
        )
        self.score = AttentionScore(embed_dim, attention_dim, 1, gated, dropout)
        self.classifier = nn.Linear(embed_dim, n_outputs)

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        embedding = self.embed(features)
        attention = masked_softmax(self.score(embedding).squeeze(-1), mask)
        bag = torch.bmm(attention.unsqueeze(1), embedding).squeeze(1)
        scores = self.classifier(embedding).masked_fill(~mask.unsqueeze(-1), 0.0)
        extra: dict[str, Tensor] = {}
        return MILOutput(self.classifier(bag), attention, scores, None, extra)
