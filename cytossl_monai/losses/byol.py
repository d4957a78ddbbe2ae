"""The regression loss of BYOL: distance on the unit sphere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.losses.precision import full_precision, widen

__all__ = ["BYOLLoss"]


class BYOLLoss(nn.Module):
    """``mean_i |p_i / |p_i| - z_i / |z_i||^2 = mean_i (2 - 2 cos(p_i, z_i))``, 0 at best and 4 at worst.

    Paper: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, equation 2.
    """

    @full_precision
    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch.

        Args:
            predictions: (B, D) float, of the student's predictor.
            targets: (B, D) float, of the teacher; no gradient flows into them.

        Returns:
            scalar.

        Raises:
            ValueError: when the shapes differ or are not two-dimensional.
        """
        if predictions.ndim != 2 or predictions.shape != targets.shape:
            raise ValueError(
                f"predictions and targets must both be (B, D), got {tuple(predictions.shape)} "
                f"and {tuple(targets.shape)}"
            )
        cosines = F.cosine_similarity(widen(predictions), widen(targets).detach(), dim=1)
        return (2.0 - 2.0 * cosines).mean()
