"""VPU learning: features of tiles from slide labels alone, as LESS learns them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cytossl_monai.losses.vpu import VPULoss, mix_with_positives
from cytossl_monai.methods.base import SSLMethod, Views

__all__ = ["VPU"]


class VPU(SSLMethod):
    """Tell tiles of benign slides (positive) from those of malignant ones (unlabelled).

    A tile of a benign slide is benign for sure; one of a malignant slide may be either. So benign tiles are the
    *positive* samples of positive-unlabelled learning, and no tile need be labelled. What is kept is the encoder.

    Unlike the self-supervised methods it needs the slides' labels: ``views["label"]`` (B,) int64, 0 on tiles of benign
    slides, which :class:`cytossl_monai.transforms.tiling.dictionary.LabelTilesd` adds to the items. It looks at the
    first global view alone.

    Papers: Zhao et al., "LESS: Label-efficient multi-scale learning for cytological whole slide image screening",
    Medical Image Analysis 2024; Chen et al., "A variational approach for learning from positive and unlabeled data",
    NeurIPS 2020.

    Args:
        encoder: maps images (B, 3, H, W) to (B, D).
        consistency_weight: of the term on mixed samples.
        beta: of the Beta distribution of the shares they are mixed by.
    """

    def __init__(self, encoder: nn.Module, consistency_weight: float = 0.03, beta: float = 0.3) -> None:
        super().__init__(encoder)
        self.head = nn.Linear(self.student.embed_dim, 1)
        self.loss = VPULoss(consistency_weight, beta)

    def forward(self, views: Views) -> dict[str, Tensor]:
        """Loss of the first global view; see :class:`SSLMethod`.

        A batch that by chance holds tiles of one kind alone has no loss: its gradient is zero.

        Raises:
            ValueError: when ``views`` has no ``label``.
        """
        images = self.global_views(views, 1)[0]
        label = views.get("label")
        if not isinstance(label, Tensor) or label.shape != images.shape[:1]:
            raise ValueError(
                "VPU needs the label of every tile's slide, 0 for benign: add LabelTilesd to the data set's transforms "
                "(configs/ssl/vpu.yaml does)"
            )
        positive, unlabelled = images[label == 0], images[label != 0]
        if not len(positive) or not len(unlabelled):
            embedded = self.student(images)
            nothing = 0.0 * self.head(embedded).sum()
            zero = nothing.detach()
            return {"loss": nothing, "variational": zero, "consistency": zero, "features": embedded.detach()}
        share = self.loss.draw_shares(len(unlabelled), images.device)
        mixed = mix_with_positives(positive, unlabelled, share)
        embedded = self.student(torch.cat([positive, unlabelled, mixed]))
        log_phi = F.logsigmoid(self.head(embedded).squeeze(1).float())
        parts = log_phi.split([len(positive), len(unlabelled), len(mixed)])
        return {**self.loss(*parts, share), "features": embedded[: len(images)].detach()}
