"""Masked patch distillation: the student names hidden patches as the teacher, who sees them, does."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.losses.precision import full_precision, widen

__all__ = ["IBOTPatchLoss"]


class IBOTPatchLoss(nn.Module):
    """Cross-entropy over masked patches: mean over the masked patches of an image, then over images.

    An image without masked patches counts with 0, as published.

    Paper: Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022, equation 2.

    Args:
        student_temperature: > 0.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    def __init__(self, student_temperature: float = 0.1) -> None:
        super().__init__()
        if student_temperature <= 0:
            raise ValueError(f"student_temperature must be positive, got {student_temperature}")
        self.student_temperature = student_temperature

    @full_precision
    def forward(self, student: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Loss of the masked patches of a batch.

        Args:
            student: (M, K) logits of the masked patches, in the order of ``patches[mask]``.
            targets: (M, K) probabilities of the teacher for the same patches.
            mask: (B, N) bool with M true entries; M may be 0, and the loss is then 0 with gradients.

        Returns:
            scalar.

        Raises:
            ValueError: when the shapes do not fit together.
        """
        if student.shape != targets.shape or mask.ndim != 2:
            raise ValueError(
                f"student and targets must both be (M, K) and mask (B, N), got {tuple(student.shape)}, "
                f"{tuple(targets.shape)} and {tuple(mask.shape)}"
            )
        log_probabilities = F.log_softmax(widen(student) / self.student_temperature, dim=-1)
        losses = -(targets.detach() * log_probabilities).sum(-1)
        per_image = mask.sum(1, keepdim=True).clamp_min(1)
        weights = (1.0 / per_image.to(losses.dtype)).squeeze(1)[mask.nonzero()[:, 0]]
        return (losses * weights).sum() / mask.shape[0]
