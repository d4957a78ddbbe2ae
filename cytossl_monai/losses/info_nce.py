"""InfoNCE between queries and the keys of a momentum teacher, negatives from the whole batch of all processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.losses.gather import gather
from cytossl_monai.losses.precision import full_precision, widen
from cytossl_monai.utils.distributed import rank

__all__ = ["InfoNCELoss"]


class InfoNCELoss(nn.Module):
    """Cross-entropy of telling the key of the same image from the keys of all other images.

    ``L = 2 t * mean_i( -log( exp(q_i.k_i / t) / sum_j exp(q_i.k_j / t) ) )`` with L2-normalised ``q`` and ``k``.
    The factor ``2 t`` is MoCo v3's: it keeps the gradient's size when the temperature changes.

    Paper: Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021, Algorithm 1.

    Args:
        temperature: ``t`` > 0.
        scaled: multiply by ``2 t``, as published; False gives plain InfoNCE.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    def __init__(self, temperature: float = 0.2, scaled: bool = True) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.scaled = scaled

    @full_precision
    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Loss of the local queries against the keys of all processes.

        Args:
            queries: (B, D) float, row ``i`` of image ``i``.
            keys: (B, D) float, row ``i`` of the same image ``i``. Gradients flow into them when they ask for it, also
                into those of other processes.

        Returns:
            scalar, the mean over the local queries.

        Raises:
            ValueError: when the shapes differ or are not two-dimensional.
        """
        if queries.ndim != 2 or queries.shape != keys.shape:
            raise ValueError(
                f"queries and keys must both be (B, D), got {tuple(queries.shape)} and {tuple(keys.shape)}"
            )
        queries = F.normalize(widen(queries), dim=1)
        keys = gather(F.normalize(widen(keys), dim=1))
        logits = queries @ keys.T / self.temperature
        batch = queries.shape[0]
        targets = torch.arange(batch, device=queries.device) + batch * rank()
        loss = F.cross_entropy(logits, targets)
        return loss * (2 * self.temperature) if self.scaled else loss
