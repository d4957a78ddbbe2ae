"""DINO: self-distillation with no labels, over multi-crops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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

    Args:
        encoder: maps images (B, 3, H, W) of several sizes to (B, D).
        out_dim: number of prototypes K.
        hidden_dim: width inside the head.
        bottleneck_dim: width before the prototypes.
        head_layers: linear layers before the prototypes.
        learn_gain: learn the gains of the weight-normalised last layer (``norm_last_layer=False``); less stable.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, after the warm-up.
        warmup_teacher_temperature: at the start.
        temperature_warmup: share of the training over which it rises (30 of 300 epochs).
        centering: ``momentum`` or ``sinkhorn``.
        center_momentum: of the center.
        momentum: of the teacher at the start; it rises to 1 along a cosine. The paper advises more than 0.996 for
            batches far below 1024 images.
        freeze_last_layer: share of the training during which the prototypes stand still (1 of 100 epochs).

    Raises:
        ValueError: for a value outside its range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        head_layers: int = 3,
        learn_gain: bool = False,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        temperature_warmup: float = 0.1,
        centering: str = "momentum",
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        freeze_last_layer: float = 0.01,
    ) -> None:
        super().__init__(
            encoder,
            getattr(encoder, "embed_dim", 0),
            out_dim,
            hidden_dim,
            bottleneck_dim,
            head_layers,
            learn_gain,
            student_temperature,
            teacher_temperature,
            warmup_teacher_temperature,
            temperature_warmup,
            centering,
            center_momentum,
            momentum,
            freeze_last_layer,
        )
        self.follow_schedules(0.0)

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
