"""MoCo v3: contrast two views through a momentum teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cytossl_monai.losses.info_nce import InfoNCELoss
from cytossl_monai.methods.base import SSLMethod, Views
from cytossl_monai.methods.parts.heads import mlp_head
from cytossl_monai.methods.parts.schedules import cosine

__all__ = ["MoCoV3", "freeze_patch_projection"]


class MoCoV3(SSLMethod):
    """MoCo v3 with the recipe for vision transformers.

    The student embeds both views, projects and predicts; the teacher embeds and projects both. Each prediction is to
    find the teacher's key of the *other* view of the same image among the keys of the whole batch (all processes), and
    the loss is the sum over both directions. No queue: large batches serve as the dictionary.

    Paper: Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021. For a ResNet
    the paper's projector has two layers and its predictor no last normalisation: ``projector_layers=2``,
    ``predictor_last_norm=False``, ``freeze_patches=False``.

    Args:
        encoder: maps images (B, 3, H, W) to (B, D).
        dim: width of queries and keys.
        hidden_dim: width inside projector and predictor.
        projector_layers: linear layers of the projector.
        predictor_layers: linear layers of the predictor.
        predictor_last_norm: normalise the predictor's output over the batch.
        temperature: of the softmax over keys.
        momentum: of the teacher at the start; it rises to 1 along a cosine.
        freeze_patches: keep the patch projection at its random start, which the paper found to prevent the dips in
            accuracy that ViTs show with large batches. Use False when going on from published weights of which the
            projection should adapt.

    Raises:
        ValueError: for a momentum outside [0, 1], a temperature that is not positive, or ``freeze_patches`` with an
            encoder without patch projection.
    """

    teacher: nn.Module
    teacher_projector: nn.Module

    def __init__(
        self,
        encoder: nn.Module,
        dim: int = 256,
        hidden_dim: int = 4096,
        projector_layers: int = 3,
        predictor_layers: int = 2,
        predictor_last_norm: bool = True,
        temperature: float = 0.2,
        momentum: float = 0.99,
        freeze_patches: bool = False,
    ) -> None:
        super().__init__(encoder)
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        if freeze_patches:
            freeze_patch_projection(encoder)
        self.projector = mlp_head(self.student.embed_dim, hidden_dim, dim, projector_layers, last_norm=True)
        self.predictor = mlp_head(dim, hidden_dim, dim, predictor_layers, last_norm=predictor_last_norm)
        self.add_teacher("teacher", "student")
        self.add_teacher("teacher_projector", "projector")
        self.loss = InfoNCELoss(temperature)
        self.base_momentum = momentum

    def forward(self, views: Views) -> dict[str, Tensor]:
        """Loss of the first two global views; see :class:`SSLMethod`. ``contrast`` is the same figure per direction."""
        first, second = self.global_views(views, 2)[:2]
        with torch.no_grad():
            self.hold_teacher_mode()
            key_a, key_b = (self.teacher_projector(e) for e in self.encode_each(self.teacher, (first, second)))
        embedded_a, embedded_b = self.encode_each(self.student, (first, second))
        query_a = self.predictor(self.projector(embedded_a))
        query_b = self.predictor(self.projector(embedded_b))
        loss = self.loss(query_a, key_b) + self.loss(query_b, key_a)
        return {"loss": loss, "contrast": loss.detach() / 2, "features": embedded_a.detach()}

    def update(self, progress: float) -> None:
        """Let the teacher follow with a momentum that rises from its start to 1."""
        self.move_teachers(cosine(self.base_momentum, 1.0, progress))


def freeze_patch_projection(encoder: nn.Module) -> None:
    """Stop training the patch projection of a ViT; position embeddings, where learned, go on.

    Raises:
        ValueError: when the encoder has no module named ``patch_embedding``.
    """
    found = [module for name, module in encoder.named_modules() if name.rsplit(".", 1)[-1] == "patch_embedding"]
    if not found:
        raise ValueError(
            "freeze_patches needs a ViT: this encoder has no `patch_embedding`. Set freeze_patches to false for it"
        )
    for module in found:
        for name, parameter in module.named_parameters():
            if "position" not in name and "cls" not in name:
                parameter.requires_grad_(False)
