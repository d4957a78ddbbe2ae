"""DINO: self-distillation with no labels, over multi-crops."""

from __future__ import annotations

import torch
from torch import Tensor

from cytossl_monai.losses.dino import entropy
from cytossl_monai.methods.base import Views
from cytossl_monai.methods.self_distillation import SelfDistillation

__all__ = ["DINO"]


class DINO(SelfDistillation):
    """DINO: the student, on any crop, is to name the prototypes that the teacher names on a global crop.

    The student sees global and local crops, the teacher global ones only: what a small crop shows is to tell what the
    large one holds. The teacher is kept: the paper found it better than the student throughout the training.

    Paper: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021; Sinkhorn-Knopp in
    place of centring as in DINOv2 (Oquab et al., TMLR 2024).

    The arguments are those of :class:`SelfDistillation`; the encoder maps images (B, 3, H, W) of several sizes to
    (B, D).

    Raises:
        ValueError: for a value outside its range.
    """

    def forward(self, views: Views) -> dict[str, Tensor]:
        """Loss over all global and local views; see :class:`SSLMethod`.

        ``teacher_entropy`` (nats) is the mean entropy of the targets, ``teacher_spread`` the entropy of their mean:
        the first at ``log K`` means flat targets, the second near 0 means one target for all.
        """
        crops = self.global_views(views, 2)
        batch, count = len(crops[0]), len(crops)
        with torch.no_grad():
            self.hold_teacher_mode()
            seen = self.encode_jointly(self.teacher, crops)
            targets = self.target(self.teacher_head(seen), self.teacher_temperature)
        crops = [*crops, *views.get("local", ())]
        logits = self.head(self.encode_jointly(self.student, crops))
        loss = self.loss(logits.split(batch), targets.split(batch))
        return {
            "loss": loss,
            "teacher_entropy": entropy(targets).mean(),
            "teacher_spread": entropy(targets.mean(0)),
            "teacher_student_kl": loss.detach() - entropy(targets).mean(),
            "features": seen[: len(seen) // count],
        }
