"""DTFD-MIL: double-tier feature distillation over pseudo-bags (Zhang et al., CVPR 2022)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cytossl_monai.networks.mil.abmil import AttentionScore
from cytossl_monai.networks.mil.base import MILModel, MILOutput, masked_softmax

__all__ = ["DTFDMIL"]

DISTILLATIONS = ("afs", "maxmin", "max")


class DTFDMIL(MILModel):
    """Splits a bag into pseudo-bags, classifies each (tier 1), distils one feature or two of each for tier 2.

    ``afs``: the pseudo-bag's attention-weighted feature. ``max``: its tile of highest class evidence. ``maxmin``: its
    tiles of highest and lowest evidence. Tier 2 is attention-based MIL over what was distilled. Tier 1 has a loss of
    its own: each pseudo-bag is taught the bag's label. The embedding learns from tier 1 alone, as published.

    In training tiles are dealt to pseudo-bags at random, in evaluation by turns (tile i to pseudo-bag i mod M), so that
    the result is repeatable; the order of tiles therefore matters a little, unless ``n_pseudo`` is 1.

    Attention is tier 1's times tier 2's of the pseudo-bag (``max``, ``maxmin``: tier 2's, on the distilled tiles).

    Args:
        in_features: width D of the features.
        n_outputs: number of logits.
        n_pseudo: number M of pseudo-bags; a bag of fewer tiles has as many as it has tiles.
        distillation: "afs", "maxmin" or "max".
        embed_dim: width of the tile embedding.
        attention_dim: hidden width of both attentions.
        dropout: of embedding and attentions, in training.
        tier1_weight: weight of tier 1's loss.
    """

    order_matters = True

    def __init__(
        self,
        in_features: int,
        n_outputs: int,
        n_pseudo: int = 4,
        distillation: str = "afs",
        embed_dim: int = 256,
        attention_dim: int = 128,
        dropout: float = 0.25,
        tier1_weight: float = 1.0,
    ) -> None:
        super().__init__(in_features, n_outputs)
        if distillation not in DISTILLATIONS:
            raise ValueError(f"distillation must be one of {DISTILLATIONS}, not {distillation!r}")
        if n_pseudo < 1:
            raise ValueError(f"n_pseudo must be at least 1, got {n_pseudo}")
        self.order_matters = n_pseudo > 1
        self.n_pseudo, self.distillation, self.embed_dim = n_pseudo, distillation, embed_dim
        self.attention_dim, self.dropout, self.tier1_weight = attention_dim, float(dropout), float(tier1_weight)
        self.embed = nn.Sequential(nn.Linear(in_features, embed_dim), nn.ReLU(), nn.Dropout(dropout))
        self.score = AttentionScore(embed_dim, attention_dim, 1, True, dropout)
        self.tier1 = nn.Linear(embed_dim, n_outputs)
        self.score2 = AttentionScore(embed_dim, attention_dim, 1, True, dropout)
        self.tier2 = nn.Linear(embed_dim, n_outputs)

    def _deal(self, mask: Tensor) -> Tensor:
        """(B, M, N) bool: which tile lies in which pseudo-bag."""
        if self.training:
            chance = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2.0)
            turn = chance.argsort(dim=1).argsort(dim=1)
        else:
            turn = mask.cumsum(dim=1) - 1
        groups = torch.arange(self.n_pseudo, device=mask.device).view(1, -1, 1)
        return ((turn % self.n_pseudo).unsqueeze(1) == groups) & mask.unsqueeze(1)

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        embedding = self.embed(features)
        members = self._deal(mask)
        filled = members.any(dim=2)
        inner = masked_softmax(self.score(embedding).transpose(1, 2), members)  # (B, M, N)
        pseudo = torch.bmm(inner, embedding)
        tier1_logits = self.tier1(pseudo)
        tile_logits = self.tier1(embedding)
        if self.distillation == "afs":
            distilled, there = pseudo, filled
            places = torch.zeros(0, device=features.device)
        else:
            # Evidence for the pseudo-bag's own decision: attention times the tile's logit of the predicted output.
            decided = tier1_logits.argmax(dim=2)  # (B, M)
            evidence = inner * tile_logits.transpose(1, 2).gather(
                1, decided.unsqueeze(-1).expand(-1, -1, mask.shape[1])
            )
            places = evidence.masked_fill(~members, float("-inf")).argmax(dim=2)
            there = filled
            if self.distillation == "maxmin":
                lowest = evidence.masked_fill(~members, float("inf")).argmin(dim=2)
                places, there = torch.cat([places, lowest], dim=1), torch.cat([filled, filled], dim=1)
            distilled = embedding.gather(1, places.unsqueeze(-1).expand(-1, -1, embedding.shape[2]))
        # The published training has an optimiser a tier: what tier 2 is wrong about does not move the embedding.
        distilled = distilled.detach()
        outer = masked_softmax(self.score2(distilled).squeeze(-1), there)
        logits = self.tier2(torch.bmm(outer.unsqueeze(1), distilled).squeeze(1))
        if self.distillation == "afs":
            attention = torch.bmm(outer.unsqueeze(1), inner).squeeze(1)
        else:
            attention = torch.zeros_like(inner[:, 0]).scatter_add(1, places, outer)
        scores = self.tier2(embedding).masked_fill(~mask.unsqueeze(-1), 0.0)
        extra = {"tier1_logits": tier1_logits, "filled": filled}
        return MILOutput(logits, attention, scores, None, extra)

    @torch.jit.unused
    def auxiliary_losses(self, output: MILOutput, indicator: Tensor) -> dict[str, Tensor]:
        """Binary cross-entropy of every pseudo-bag with its bag's label."""
        logits, filled = output.extra["tier1_logits"], output.extra["filled"]
        wanted = indicator.unsqueeze(1).expand_as(logits)
        return {"tier1": self.tier1_weight * F.binary_cross_entropy_with_logits(logits[filled], wanted[filled])}
