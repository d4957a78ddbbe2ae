"""NT-Xent: the contrastive loss of SimCLR, negatives from both views of the whole batch of all processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.losses.gather import gather
from cytossl_monai.losses.precision import full_precision, widen
from cytossl_monai.utils.distributed import rank

__all__ = ["NTXentLoss"]


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross-entropy: tell an image's other view from the 2N - 2 views of other images.

    ``L = mean over all 2N views i of -log( exp(s_ij / t) / sum_{k != i} exp(s_ik / t) )``, ``j`` the other view of the
    same image, ``s`` the cosine. In one process this is MONAI's ``ContrastiveLoss``; here the exponentials cannot
    overflow, no (2N, 2N, D) tensor is made, and negatives come from all processes, with gradients.

    Paper: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020.

    Args:
        temperature: ``t`` > 0.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    @full_precision
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Loss of the local views against those of all processes.

        Args:
            first: (B, D) float, projections of one view of each image.
            second: (B, D) float, projections of the other view.

        Returns:
            scalar, the mean over the 2B local views.

        Raises:
            ValueError: when the shapes differ or are not two-dimensional.
        """
        if first.ndim != 2 or first.shape != second.shape:
            raise ValueError(f"both views must be (B, D), got {tuple(first.shape)} and {tuple(second.shape)}")
        first, second = F.normalize(widen(first), dim=1), F.normalize(widen(second), dim=1)
        everything = torch.cat([gather(first), gather(second)])
        batch, total = first.shape[0], everything.shape[0] // 2
        own = torch.arange(batch, device=first.device) + batch * rank()
        itself = torch.cat([own, own + total])
        partner = torch.cat([own + total, own])
        logits = torch.cat([first, second]) @ everything.T / self.temperature
        is_itself = torch.arange(2 * total, device=first.device) == itself[:, None]
        return F.cross_entropy(logits.masked_fill(is_itself, float("-inf")), partner)
