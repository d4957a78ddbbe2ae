"""DSMIL: dual-stream MIL with a critical tile (Li, Li & Eliceiri, CVPR 2021)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cytossl_monai.networks.mil.base import MILModel, MILOutput, masked_max, masked_softmax

__all__ = ["DSMIL"]


class DSMIL(MILModel):
    """A tile stream finds the critical tile of every class, a bag stream weighs all tiles by likeness to it.

    Tile stream: ``s = W h``, its maximum over tiles is one prediction. Bag stream: queries ``q_i`` and values ``v_i``,
    ``a_ik = softmax_i(q_i . q_m(k) / sqrt(dim))`` with m(k) the critical tile of output k, and a classifier that
    sees every output's bag vector. The logits are the mean of both; each stream also has its own loss, as in the
    paper. The order does not matter.

    Args:
        in_features: width D of the features.
        n_outputs: number of logits.
        embed_dim: width of the tile embedding h.
        query_dim: width of the queries.
        dropout: of the embedding and the values, in training.
        stream_weight: weight of the two streams' own losses.
    """

    def __init__(
        self,
        in_features: int,
        n_outputs: int,
        embed_dim: int = 256,
        query_dim: int = 128,
        dropout: float = 0.25,
        stream_weight: float = 0.5,
    ) -> None:
        super().__init__(in_features, n_outputs)
        self.embed_dim, self.query_dim = embed_dim, query_dim
        self.dropout, self.stream_weight = float(dropout), float(stream_weight)
        self.embed = nn.Sequential(nn.Linear(in_features, embed_dim), nn.ReLU(), nn.Dropout(dropout))
        self.tile_classifier = nn.Linear(embed_dim, n_outputs)
        self.query = nn.Sequential(
            nn.Linear(embed_dim, query_dim), nn.ReLU(), nn.Linear(query_dim, query_dim), nn.Tanh()
        )
        self.value = nn.Sequential(nn.Dropout(dropout), nn.Linear(embed_dim, embed_dim), nn.ReLU())
        # One vector of K x embed_dim in, K logits out: the paper's one-dimensional convolution over the outputs.
        self.bag_classifier = nn.Linear(n_outputs * embed_dim, n_outputs)

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        embedding = self.embed(features)
        scores = self.tile_classifier(embedding)
        tile_logits, critical = masked_max(scores, mask)
        chosen = embedding.gather(1, critical.unsqueeze(-1).expand(-1, -1, embedding.shape[2]))
        queries, asked = self.query(embedding), self.query(chosen)
        likeness = torch.bmm(asked, queries.transpose(1, 2)) / self.query_dim**0.5
        weights = masked_softmax(likeness, mask.unsqueeze(1))
        bags = torch.bmm(weights, self.value(embedding))
        bag_logits = self.bag_classifier(bags.flatten(1))
        logits = 0.5 * (bag_logits + tile_logits)
        highest = logits.argmax(dim=1).view(-1, 1, 1).expand(-1, 1, weights.shape[2])
        extra = {"tile_logits": tile_logits, "bag_logits": bag_logits}
        scores = scores.masked_fill(~mask.unsqueeze(-1), 0.0)
        return MILOutput(logits, weights.gather(1, highest).squeeze(1), scores, weights, extra)

    @torch.jit.unused
    def auxiliary_losses(self, output: MILOutput, indicator: Tensor) -> dict[str, Tensor]:
        """Binary cross-entropy of each stream by itself, over all outputs, as in the paper."""
        weight = 0.5 * self.stream_weight
        return {
            name.replace("logits", "stream"): weight * F.binary_cross_entropy_with_logits(output.extra[name], indicator)
            for name in ("tile_logits", "bag_logits")
        }
