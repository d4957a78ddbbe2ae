"""What methods learn of slides without a gradient: means in which slides count alike, a whitening, a draw of tiles."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["draw_tiles", "mean_of_slides", "whitening"]


def mean_of_slides(slides: Sequence[Tensor]) -> Tensor:
    """(D,) mean of the slides' means: every slide (N, D) counts alike, however many tiles it has."""
    return torch.stack([tiles.mean(dim=0) for tiles in slides]).mean(dim=0)


def whitening(covariance: Tensor, shrinkage: float) -> Tensor:
    """(D, D) float64: ``features @ whitening`` have the covariance 1, less where ``shrinkage`` is not small."""
    variances, axes = torch.linalg.eigh(covariance.double())
    return axes / (variances.clamp_min(0.0) + shrinkage).sqrt()


def draw_tiles(tiles: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most so many tiles of (N, D), drawn, in their order."""
    return tiles[torch.randperm(len(tiles), generator=generator)[:most].sort().values]
