"""KoLeo: spread the embeddings evenly over the sphere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.losses.gather import gather
from cytossl_monai.losses.precision import full_precision, widen
from cytossl_monai.utils.distributed import rank

__all__ = ["KoLeoLoss"]


class KoLeoLoss(nn.Module):
    """``-mean_i log(min_{j != i} |x_i - x_j| + eps)`` over L2-normalised embeddings.

    The Kozachenko-Leonenko estimator of differential entropy: each embedding is pushed off its nearest neighbour, which
    is looked for in the batch of all processes.

    Papers: Sablayrolles et al., "Spreading Vectors for Similarity Search", ICLR 2019; DINOv2 (Oquab et al., TMLR 2024).

    Args:
        eps: keeps the logarithm finite for identical embeddings.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    @full_precision
    def forward(self, embeddings: Tensor) -> Tensor:
        """Mean over the local embeddings.

        Args:
            embeddings: (B, D) float, of one view: two views of one image would be each other's neighbours.

        Returns:
            scalar.

        Raises:
            ValueError: when there are fewer than two embeddings in all.
        """
        local = F.normalize(widen(embeddings), dim=-1, eps=self.eps)
        everything = gather(local)
        if len(everything) < 2:
            raise ValueError("KoLeo needs a batch of at least 2")
        rows = torch.arange(len(local), device=local.device)
        with torch.no_grad():
            closeness = local @ everything.T
            closeness[rows, rows + len(local) * rank()] = -2.0  # nobody is his own neighbour
            nearest = closeness.argmax(1)
        # eps inside the root as well: its slope at distance 0 would be infinite.
        squared = (local - everything[nearest]).square().sum(-1)
        return -torch.log((squared + self.eps**2).sqrt() + self.eps).mean()
