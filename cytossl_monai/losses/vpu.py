"""Variational learning from positive and unlabelled samples (VPU, Chen et al., NeurIPS 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["VPULoss", "mix_with_positives"]


def mix_with_positives(positive: Tensor, unlabelled: Tensor, share: Tensor) -> Tensor:
    """Mixed samples: ``share * positive + (1 - share) * unlabelled``, each with a positive of its own.

    Args:
        positive: (P, ...), taken again from the start where there are fewer of them than unlabelled ones.
        unlabelled: (U, ...).
        share: (U,) in [0, 1].

    Returns:
        (U, ...).
    """
    partner = positive[torch.arange(len(unlabelled), device=positive.device) % len(positive)]
    weight = share.view(-1, *[1] * (unlabelled.ndim - 1)).to(unlabelled.dtype)
    return weight * partner + (1 - weight) * unlabelled


class VPULoss(nn.Module):
    """The variational loss and the consistency of mixed samples, from log-probabilities of being positive.

    ``log mean_u Phi(x_u) - mean_p log Phi(x_p)``, whose least value a classifier reaches whose Phi is proportional to
    the true probability; no share of positives among the unlabelled need be known. To it comes, ``weight`` times, the
    squared distance of logarithms on mixed samples, ``(log(g + (1 - g) Phi(x_u)) - log Phi(g x_p + (1 - g) x_u))^2``
    with g from Beta(``beta``, ``beta``). LESS (Zhao et al., Medical Image Analysis 2024) takes 0.03 and 0.3.

    Args:
        weight: of the consistency term, >= 0.
        beta: of the Beta distribution that shares are drawn from, above 0.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(self, weight: float = 0.03, beta: float = 0.3) -> None:
        super().__init__()
        if weight < 0 or beta <= 0:
            raise ValueError(f"weight must not be negative and beta be above 0, got {weight} and {beta}")
        self.weight, self.beta = float(weight), float(beta)

    def draw_shares(self, count: int, device: torch.device | None = None) -> Tensor:
        """(count,) shares of the positive in a mixed sample; from torch's generator of the CPU."""
        drawn = torch.distributions.Beta(self.beta, self.beta).sample((count,))
        return drawn.to(device)

    def forward(self, positive: Tensor, unlabelled: Tensor, mixed: Tensor, share: Tensor) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            positive: (P,) log Phi of the positive samples, P >= 1.
            unlabelled: (U,) log Phi of the unlabelled ones, U >= 1.
            mixed: (U,) log Phi of the samples of :func:`mix_with_positives`.
            share: (U,) the shares that they were mixed by.

        Returns:
            ``loss`` with gradients, and its parts ``variational`` and ``consistency`` without.

        Raises:
            ValueError: when there is no positive or no unlabelled sample.
        """
        if not len(positive) or not len(unlabelled):
            raise ValueError(
                f"VPU learning needs positive and unlabelled samples in a batch, got {len(positive)} and "
                f"{len(unlabelled)}: the cohort needs slides of both kinds"
            )
        positive, unlabelled, mixed = positive.float(), unlabelled.float(), mixed.float()
        variational = torch.logsumexp(unlabelled, 0) - math.log(len(unlabelled)) - positive.mean()
        wanted = torch.log(share + (1 - share) * unlabelled.exp() + 1e-12)
        consistency = (wanted - mixed).square().mean()
        loss = variational + self.weight * consistency
        return {"loss": loss, "variational": variational.detach(), "consistency": consistency.detach()}
