"""The plainest multiple-instance classifiers: mean and maximum over tiles."""

import torch
from torch import Tensor, nn

from cytossl_monai.networks.mil.base import MILModel, MILOutput, masked_max, masked_mean

__all__ = ["MaxMIL", "MeanMIL"]


class MeanMIL(MILModel):
    """Classifies the mean of the embedded tiles. Every tile counts alike; the order does not matter.

    Args:
        in_features: width D of the features.
        n_outputs: number of logits.
        embed_dim: width of the embedding; 0 classifies the mean feature itself (logistic regression).
        dropout: of the embedding, in training.
    """

    def __init__(self, in_features: int, n_outputs: int, embed_dim: int = 256, dropout: float = 0.25) -> None:
        super().__init__(in_features, n_outputs)
        self.embed_dim, self.dropout = embed_dim, float(dropout)
        self.embed = _embedding(in_features, embed_dim, dropout)
        self.classifier = nn.Linear(embed_dim or in_features, n_outputs)

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``. Attention is 1/n on every tile."""
        embedding = self.embed(features)
        attention = mask.to(embedding.dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        scores = self.classifier(embedding).masked_fill(~mask.unsqueeze(-1), 0.0)
        extra: dict[str, Tensor] = {}
        return MILOutput(self.classifier(masked_mean(embedding, mask)), attention, scores, None, extra)


class MaxMIL(MILModel):
    """Classifies every tile; the highest logit of each output stands for the bag. The order does not matter.

    Args:
        in_features: width D of the features.
        n_outputs: number of logits.
        embed_dim: width of the embedding; 0 classifies the features themselves.
        dropout: of the embedding, in training.
    """

    def __init__(self, in_features: int, n_outputs: int, embed_dim: int = 256, dropout: float = 0.25) -> None:
        super().__init__(in_features, n_outputs)
        self.embed_dim, self.dropout = embed_dim, float(dropout)
        self.embed = _embedding(in_features, embed_dim, dropout)
        self.classifier = nn.Linear(embed_dim or in_features, n_outputs)

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``. Attention is 1 on the tile that decided the highest logit."""
        scores = self.classifier(self.embed(features))
        logits, places = masked_max(scores, mask)
        deciding = places.gather(1, logits.argmax(dim=1, keepdim=True))
        attention = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).scatter(1, deciding, 1.0)
        extra: dict[str, Tensor] = {}
        return MILOutput(logits, attention, scores.masked_fill(~mask.unsqueeze(-1), 0.0), None, extra)


def _embedding(in_features: int, embed_dim: int, dropout: float) -> nn.Sequential:
    if embed_dim == 0:
        return nn.Sequential(nn.Dropout(dropout))
    return nn.Sequential(nn.Linear(in_features, embed_dim), nn.ReLU(), nn.Dropout(dropout))
