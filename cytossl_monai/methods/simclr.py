"""SimCLR: contrast two views within the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cytossl_monai.losses.nt_xent import NTXentLoss
from cytossl_monai.methods.base import SSLMethod, Views
from cytossl_monai.methods.parts.heads import mlp_head

__all__ = ["SimCLR"]


class SimCLR(SSLMethod):
    """SimCLR: an embedding is to be closer to that of the image's other view than to any other in the batch.

    One network and no teacher. Both views of the batch go through it together, so that batch normalisation, where
    there is any, sees 2B images. Negatives are all other views of the batch of all processes: the batch should be
    large.

    Paper: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020. Its last
    normalisation has a scale of its own; here it has none, for the loss looks at directions only.

    Args:
        encoder: maps images (B, 3, H, W) to (B, D).
        dim: width of the projection.
        hidden_dim: width inside the projector; None takes the encoder's, as published.
        projector_layers: linear layers of the projector.
        temperature: of the softmax over views.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int = 128,
        hidden_dim: int | None = None,
        projector_layers: int = 2,
        temperature: float = 0.1,
    ) -> None:
        super().__init__(encoder)
        width = self.student.embed_dim
        self.projector = mlp_head(width, hidden_dim or width, dim, projector_layers, last_norm=True)
        self.loss = NTXentLoss(temperature)

    def forward(self, views: Views) -> dict[str, Tensor]:
        """Loss of the first two global views; see :class:`SSLMethod`."""
        first, second = self.global_views(views, 2)[:2]
        embedded = self.student(torch.cat([first, second]))
        loss = self.loss(*self.projector(embedded).split([len(first), len(second)]))
        return {"loss": loss, "contrast": loss.detach(), "features": embedded[: len(first)].detach()}
