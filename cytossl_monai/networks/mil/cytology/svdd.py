"""One-class detection: how far a slide's tiles lie from negative slides' (deep SVDD, Ruff et al., ICML 2018)."""

import torch
from torch import Tensor, nn

from cytossl_monai.networks.mil.base import MILOutput, masked_softmax
from cytossl_monai.networks.mil.cytology.one_class import OneClassMIL

__all__ = ["DeepSVDD"]

_FAR_FROM_ZERO = 0.1  # a centre at zero could be met by a network that maps all to zero


class DeepSVDD(OneClassMIL):
    """Learns where the tiles of negative slides lie, and asks of a slide how far its farthest tiles are from there.

    ``d(x) = ||f(x) - c||^2`` with a network f without biases and a fixed centre c, the mean of f at the start; training
    lowers the mean distance of the tiles of negative slides. Positive slides teach it nothing: where few cells of a
    slide are malignant, a label of the slide says little about a tile (arXiv 2604.07722 finds one-class detection ahead
    of MIL there). Scores are standardised by the running mean and deviation of the negative slides'. The logits are
    (-s, s) / 2, so the probability is the sigmoid of s; no gradient passes through them. Calibration, where positive
    slides are at hand, sets its temperature.

    Attention is the softmax of the tiles' standardised distances; tile scores are their logits.

    Args:
        in_features: width D of the features.
        n_outputs: 2: negative, positive.
        embed_dim: width of f.
        hidden_dim: width inside it.
        top_share: share of the tiles whose distances make a slide's score, in (0, 1].
        momentum: of the running figures of the negative slides.

    Raises:
        ValueError: for other than two outputs, and for numbers out of range.
    """

    def __init__(
        self,
        in_features: int,
        n_outputs: int = 2,
        embed_dim: int = 64,
        hidden_dim: int = 128,
        top_share: float = 0.02,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(in_features, n_outputs, top_share)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        self.embed_dim, self.hidden_dim = embed_dim, hidden_dim
        self.momentum = float(momentum)
        self.embed = nn.Sequential(
            nn.Linear(in_features, hidden_dim, bias=False), nn.ReLU(), nn.Linear(hidden_dim, embed_dim, bias=False)
        )
        self.centre: Tensor
        self.started: Tensor
        self.register_buffer("centre", torch.zeros(embed_dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        distance = (self.embed(features) - self.centre).square().sum(dim=-1)
        scores = self.slide_scores(distance, mask)
        slide = ((scores - self.score_mean) / self.score_std).detach()
        tiles = ((distance - self.score_mean) / self.score_std).detach()
        attention = masked_softmax(tiles, mask)
        tile_logits = torch.stack([-0.5 * tiles, 0.5 * tiles], dim=-1).masked_fill(~mask.unsqueeze(-1), 0.0)
        extra = {"distance": distance, "mask": mask, "scores": scores, "features": features}
        return MILOutput(torch.stack([-0.5 * slide, 0.5 * slide], dim=1), attention, tile_logits, None, extra)

    @torch.jit.unused
    def auxiliary_losses(self, output: MILOutput, indicator: Tensor) -> dict[str, Tensor]:
        """Mean distance of the tiles of negative slides; 0 (with a gradient of 0) in a batch without any."""
        negative = indicator[:, 0] > 0
        distance, mask = output.extra["distance"], output.extra["mask"]
        if not bool(negative.any()):
            return {"svdd": 0.0 * distance.masked_fill(~mask, 0.0).sum()}
        if self.training and not bool(self.started):
            self._start(output.extra["features"][negative][mask[negative]])
            distance = (self.embed(output.extra["features"]) - self.centre).square().sum(dim=-1)
        per_slide = distance.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)
        if self.training:
            self._follow(self.slide_scores(distance.detach(), mask)[negative])
        return {"svdd": per_slide[negative].mean()}

    @torch.no_grad()
    def _start(self, tiles: Tensor) -> None:
        """Set the centre from the first negative tiles, and keep its numbers off zero."""
        mean = self.embed(tiles).mean(dim=0)
        away = torch.where(mean < 0, -_FAR_FROM_ZERO, _FAR_FROM_ZERO)
        self.centre.copy_(torch.where(mean.abs() < _FAR_FROM_ZERO, away, mean))

    @torch.no_grad()
    def _follow(self, scores: Tensor) -> None:
        """Move the running mean and deviation of negative slides' scores."""
        mean = scores.mean()
        deviation = (scores - (self.score_mean if bool(self.started) else mean)).square().mean().sqrt()
        keep = self.momentum if bool(self.started) else 0.0
        self.score_mean.lerp_(mean, 1 - keep)
        # A single slide has no deviation yet: a tenth of its score stands in.
        self.score_std.lerp_(deviation.clamp_min(0.1 * float(mean.abs()) + 1e-6), 1 - keep)
        self.started.fill_(True)
