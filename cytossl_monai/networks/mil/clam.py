"""CLAM: attention with an instance clustering loss (Lu et al., Nature Biomedical Engineering 2021)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cytossl_monai.networks.mil.abmil import AttentionScore
from cytossl_monai.networks.mil.base import MILModel, MILOutput, masked_softmax

__all__ = ["CLAM", "smooth_top1_svm"]


class CLAM(MILModel):
    """Gated attention (single- or multi-branch) whose most and least attended tiles learn to be told apart.

    Single branch (``multi_branch=False``, CLAM-SB): one attention. Multi-branch (CLAM-MB): one attention an output,
    each with a classifier of its own on its own bag vector. In training, for each output that is on, the ``n_sampled``
    most attended tiles are taken as positive and as many least attended as negative evidence for it, and a two-way
    classifier of that output is trained on them; with ``exclusive`` outputs (one class holds) the most attended tiles
    are negative evidence for the outputs that are off. The order does not matter.

    Args:
        in_features: width D of the features.
        n_outputs: number of logits.
        multi_branch: CLAM-MB, else CLAM-SB.
        embed_dim: width of the tile embedding.
        attention_dim: hidden width of the attention.
        dropout: of embedding and attention, in training.
        n_sampled: tiles taken from either end (at most half the bag).
        instance_weight: weight of the clustering loss (the paper adds it as 0.3 to 0.7 of the bag's).
        instance_loss: "svm" (smooth top-1 SVM, as in the paper) or "ce" (cross-entropy).
        exclusive: outputs exclude one another (subtyping in the paper).
    """

    def __init__(
        self,
        in_features: int,
        n_outputs: int,
        multi_branch: bool = False,
        embed_dim: int = 256,
        attention_dim: int = 128,
        dropout: float = 0.25,
        n_sampled: int = 8,
        instance_weight: float = 0.3,
        instance_loss: str = "svm",
        exclusive: bool = True,
    ) -> None:
        super().__init__(in_features, n_outputs)
        if instance_loss not in ("svm", "ce"):
            raise ValueError(f"instance_loss must be 'svm' or 'ce', not {instance_loss!r}")
        if n_sampled < 1:
            raise ValueError(f"n_sampled must be at least 1, got {n_sampled}")
        self.multi_branch, self.embed_dim, self.attention_dim = multi_branch, embed_dim, attention_dim
        self.dropout, self.n_sampled, self.instance_weight = float(dropout), n_sampled, float(instance_weight)
        self.instance_loss, self.exclusive = instance_loss, exclusive
        self.embed = nn.Sequential(nn.Linear(in_features, embed_dim), nn.ReLU(), nn.Dropout(dropout))
        self.score = AttentionScore(embed_dim, attention_dim, n_outputs if multi_branch else 1, True, dropout)
        # Row k is the classifier of output k; multi-branch reads its own bag vector, single-branch the common one.
        self.classifier = nn.Linear(embed_dim, n_outputs)
        self.instance_classifier = nn.Linear(embed_dim, 2 * n_outputs)

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        embedding = self.embed(features)
        weights = masked_softmax(self.score(embedding).transpose(1, 2), mask.unsqueeze(1))
        bags = torch.bmm(weights, embedding)
        if self.multi_branch:
            logits = (bags * self.classifier.weight).sum(dim=-1) + self.classifier.bias
            highest = logits.argmax(dim=1).view(-1, 1, 1).expand(-1, 1, weights.shape[2])
            attention = weights.gather(1, highest).squeeze(1)
        else:
            logits = self.classifier(bags.squeeze(1))
            attention = weights.squeeze(1)
        scores = self.classifier(embedding).masked_fill(~mask.unsqueeze(-1), 0.0)
        extra: dict[str, Tensor] = {}
        if self.training:
            extra["embedding"] = embedding
            extra["mask"] = mask
            extra["weights"] = weights
        return MILOutput(logits, attention, scores, weights if self.multi_branch else None, extra)

    @torch.jit.unused
    def auxiliary_losses(self, output: MILOutput, indicator: Tensor) -> dict[str, Tensor]:
        """The instance clustering loss, mean over bags and the outputs that took part."""
        if "embedding" not in output.extra or self.instance_weight == 0:
            return {}
        embedding, mask, weights = (output.extra[name] for name in ("embedding", "mask", "weights"))
        total, count = embedding.new_zeros(()), 0
        for b in range(len(embedding)):
            tiles = embedding[b][mask[b]]
            k = min(self.n_sampled, len(tiles) // 2)
            if k == 0:
                continue  # one tile cannot be both the most and the least attended
            logits = self.instance_classifier(tiles).view(len(tiles), self.n_outputs, 2)
            for output_number in range(self.n_outputs):
                attention = weights[b, output_number if self.multi_branch else 0][mask[b]].detach()
                top, low = attention.topk(k).indices, attention.topk(k, largest=False).indices
                if indicator[b, output_number] > 0.5:
                    chosen = torch.cat([top, low])
                    wanted = torch.cat([torch.ones_like(top), torch.zeros_like(low)])
                elif self.exclusive:
                    chosen, wanted = top, torch.zeros_like(top)
                else:
                    continue
                picked = logits[chosen, output_number]
                loss = smooth_top1_svm if self.instance_loss == "svm" else F.cross_entropy
                total, count = total + loss(picked, wanted), count + 1
        # The graph reaches the instance classifier even where no bag took part (all of one tile): no None gradients.
        anchor = 0.0 * sum(p.sum() for p in self.instance_classifier.parameters())
        return {"instance": self.instance_weight * total / max(1, count) + anchor}


def smooth_top1_svm(logits: Tensor, labels: Tensor, margin: float = 1.0, tau: float = 1.0) -> Tensor:
    """Smooth top-1 SVM loss (Berrada, Zisserman & Kumar, ICLR 2018): ``tau logsumexp((margin_j + s_j - s_y) / tau)``.

    Args:
        logits: (n, C).
        labels: (n,) long.
        margin: added to every class but the true one.
        tau: temperature; towards 0 it is the hinge loss.

    Returns:
        scalar mean.
    """
    away = 1.0 - F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    gap = margin * away + logits - logits.gather(1, labels.unsqueeze(1))
    return tau * torch.logsumexp(gap / tau, dim=1).mean()
