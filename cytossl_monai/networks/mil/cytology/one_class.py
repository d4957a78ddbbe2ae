"""What methods share that learn what negative slides look like: a slide is as suspicious as its farthest tiles."""

import torch
from torch import Tensor

from cytossl_monai.networks.mil.base import MILModel, masked_top_mean

__all__ = ["OneClassMIL"]


class OneClassMIL(MILModel):
    """Base of the methods that learn where the tiles of negative slides lie: a distance a tile, the farthest count.

    A slide's score is the mean over its ``top_share`` farthest tiles (one tile at least). It is standardised by the
    mean and the deviation of the negative slides' scores: 0 is what a negative slide has, 1 a deviation more.

    Args:
        in_features: width D of the features.
        n_outputs: 2: negative, positive.
        top_share: share of the tiles whose distances make a slide's score, in (0, 1].

    Raises:
        ValueError: for other than two outputs, and for a share out of range.
    """

    def __init__(self, in_features: int, n_outputs: int, top_share: float) -> None:
        super().__init__(in_features, n_outputs)
        if n_outputs != 2:
            raise ValueError(
                f"one-class detection tells negative from positive, two outputs; got {n_outputs}: join the positive "
                "classes, or take another method"
            )
        if not 0 < top_share <= 1:
            raise ValueError(f"top_share must lie in (0, 1], got {top_share}")
        self.top_share = float(top_share)
        self.score_mean: Tensor
        self.score_std: Tensor
        self.register_buffer("score_mean", torch.zeros(()))
        self.register_buffer("score_std", torch.ones(()))

    def slide_scores(self, distance: Tensor, mask: Tensor) -> Tensor:
        """(B,) mean of the ``top_share`` largest distances of each bag (B, N); at least one tile counts."""
        return masked_top_mean(distance.unsqueeze(-1), mask, self.top_share).squeeze(-1)
