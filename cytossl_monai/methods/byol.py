"""BYOL: predict the teacher's projection of the other view, without negatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cytossl_monai.losses.byol import BYOLLoss
from cytossl_monai.methods.base import SSLMethod, Views
from cytossl_monai.methods.parts.heads import mlp_head
from cytossl_monai.methods.parts.schedules import cosine

__all__ = ["BYOL"]


class BYOL(SSLMethod):
    """BYOL: the student's prediction from one view regresses the teacher's projection of the other.

    Nothing pushes embeddings apart; the predictor, the slow teacher and the normalisation inside the heads keep them
    from collapsing. It needs no large batch. Watch the collapse monitor when batches are very small.

    Paper: Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020.

    Args:
        encoder: maps images (B, 3, H, W) to (B, D).
        dim: width of projections and predictions.
        hidden_dim: width inside projector and predictor.
        momentum: of the teacher at the start; it rises to 1 along a cosine.

    Raises:
        ValueError: for a momentum outside [0, 1].
    """

    teacher: nn.Module
    teacher_projector: nn.Module

    def __init__(self, encoder: nn.Module, dim: int = 256, hidden_dim: int = 4096, momentum: float = 0.996) -> None:
        super().__init__(encoder)
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.projector = mlp_head(self.student.embed_dim, hidden_dim, dim, bias=True)
        self.predictor = mlp_head(dim, hidden_dim, dim, bias=True)
        self.add_teacher("teacher", "student")
        self.add_teacher("teacher_projector", "projector")
        self.loss = BYOLLoss()
        self.base_momentum = momentum

    def forward(self, views: Views) -> dict[str, Tensor]:
        """Loss of the first two global views; see :class:`SSLMethod`. ``cosine`` is the mean agreement, 1 at best."""
        first, second = self.global_views(views, 2)[:2]
        with torch.no_grad():
            self.hold_teacher_mode()
            target_a, target_b = (self.teacher_projector(e) for e in self.encode_each(self.teacher, (first, second)))
        embedded_a, embedded_b = self.encode_each(self.student, (first, second))
        predicted_a = self.predictor(self.projector(embedded_a))
        predicted_b = self.predictor(self.projector(embedded_b))
        loss = self.loss(predicted_a, target_b) + self.loss(predicted_b, target_a)
        return {"loss": loss, "cosine": 1.0 - loss.detach() / 4.0, "features": embedded_a.detach()}

    def update(self, progress: float) -> None:
        """Let the teacher follow with a momentum that rises from its start to 1."""
        self.move_teachers(cosine(self.base_momentum, 1.0, progress))
