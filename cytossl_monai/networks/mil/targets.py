"""Kinds of slide label: what the logits mean, the loss on them, and the probabilities they give."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cytossl_monai.networks.mil.base import MILModel, MILOutput

__all__ = [
    "TARGETS",
    "MILLoss",
    "class_probabilities",
    "decide",
    "indicator",
    "n_outputs",
    "prior_shift",
    "target_loss",
]

TARGETS = ("multiclass", "ordinal", "multilabel")
"""``multiclass``: one class of C (binary is C = 2), softmax. ``ordinal``: one of C ordered grades, by C - 1 conditional
logits (CORN: Shi, Cao & Raschka, 2023). ``multilabel``: any of C findings, sigmoid."""


def _check(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"target must be one of {TARGETS}, not {target!r}")


def n_outputs(target: str, n_classes: int) -> int:
    """Number of logits for a kind of target with ``n_classes`` classes, grades or findings.

    Raises:
        ValueError: for an unknown target, or fewer classes than it takes (2; ``multilabel``: 1).
    """
    _check(target)
    least = 1 if target == "multilabel" else 2
    if n_classes < least:
        raise ValueError(f"a {target} target takes at least {least} classes, got {n_classes}")
    return n_classes - 1 if target == "ordinal" else n_classes


def class_probabilities(logits: Tensor, target: str, bias: Tensor | None = None) -> Tensor:
    """Probabilities (B, C) of logits (B, K).

    ``ordinal``: logit k gives P(y > k | y >= k); their running product is P(y > k), which can only fall with k, and
    its differences are the probabilities of the grades. Rows of ``multiclass`` and ``ordinal`` sum to one.

    Args:
        logits: (B, K).
        target: the kind of target.
        bias: (C,) what is added to the logarithm of each class' probability (``multilabel``: to each finding's logit)
            before rows are made to sum to one. The change of a prior is such a bias; see ``prior_shift``.
    """
    if target == "multiclass":
        return torch.softmax(logits if bias is None else logits + bias, dim=-1)
    if target == "multilabel":
        return torch.sigmoid(logits if bias is None else logits + bias)
    above = torch.cumprod(torch.sigmoid(logits), dim=-1)
    ends = torch.ones_like(above[:, :1])
    grades = torch.cat([ends, above], dim=-1) - torch.cat([above, torch.zeros_like(ends)], dim=-1)
    if bias is None:
        return grades
    weighted = grades * torch.exp(bias)
    return weighted / weighted.sum(dim=-1, keepdim=True)


def prior_shift(before: Tensor, after: Tensor, target: str) -> Tensor:
    """The bias (C,) that takes probabilities from one prior to another, by Bayes' rule.

    Args:
        before: (C,) share of each class (``multilabel``: of the slides with each finding) that the logits stand for.
        after: (C,) those that the probabilities are to stand for.
        target: the kind of target.

    Raises:
        ValueError: when a share does not lie strictly between 0 and 1, or lengths differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"priors of {len(before)} and {len(after)} classes")
    both = torch.stack([before, after]).double()
    if not bool(((both > 0) & (both < 1)).all()):
        raise ValueError(f"shares must lie between 0 and 1, got {before.tolist()} and {after.tolist()}")
    if target == "multilabel":
        return torch.logit(after.double()) - torch.logit(before.double())
    return torch.log(after.double()) - torch.log(before.double())


def indicator(labels: Tensor, target: str, outputs: int) -> Tensor:
    """Which outputs should be on: (B, K) float in {0, 1}.

    Args:
        labels: (B,) long class or grade; ``multilabel``: (B, C) of 0 and 1.
        target: the kind of target.
        outputs: number K of logits.

    Returns:
        one-hot for ``multiclass``, ``y > k`` for ``ordinal``, the labels themselves for ``multilabel``.
    """
    _check(target)
    if target == "multilabel":
        return labels.float()
    if target == "multiclass":
        return F.one_hot(labels, outputs).float()
    return (labels.unsqueeze(1) > torch.arange(outputs, device=labels.device)).float()


def decide(probabilities: Tensor, target: str) -> Tensor:
    """Decisions: (B,) long class, the median grade for ``ordinal``, findings (B, C) of 0 and 1 for ``multilabel``."""
    _check(target)
    if target == "multilabel":
        return (probabilities >= 0.5).long()
    if target == "multiclass":
        return probabilities.argmax(dim=-1)
    return (1.0 - probabilities.cumsum(dim=-1)[:, :-1] > 0.5).sum(dim=-1)


def target_loss(
    logits: Tensor,
    labels: Tensor,
    target: str,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Loss of logits (B, K) against labels.

    ``multiclass``: cross-entropy. ``ordinal``: CORN's conditional binary cross-entropy, where logit k is trained on the
    bags of grade k or higher only. ``multilabel``: binary cross-entropy.

    Args:
        logits: (B, K) float.
        labels: (B,) long, or (B, C) of 0 and 1 for ``multilabel``.
        target: the kind of target.
        weight: (C,) weight of each class; for ``multilabel`` the weight of a finding's presence; None: all alike.
        label_smoothing: moves this share of the label's mass to the other side.
        reduction: "mean" over the bags (weighted, as in PyTorch's cross-entropy), or "none" for (B,).

    Raises:
        ValueError: for an unknown target or reduction.
    """
    _check(target)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', not {reduction!r}")
    if target == "multiclass":
        return F.cross_entropy(logits, labels, weight=weight, label_smoothing=label_smoothing, reduction=reduction)
    wanted = indicator(labels, target, logits.shape[1]).to(logits.dtype)
    smooth = wanted * (1.0 - label_smoothing) + 0.5 * label_smoothing
    if target == "multilabel":
        each = F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weight, reduction="none").mean(dim=1)
        return each.mean() if reduction == "mean" else each
    steps = torch.arange(logits.shape[1], device=logits.device)
    asked = (labels.unsqueeze(1) >= steps).to(logits.dtype)  # logit k answers only for bags that reached grade k
    each = (F.binary_cross_entropy_with_logits(logits, smooth, reduction="none") * asked).sum(dim=1)
    per_bag = torch.ones_like(each) if weight is None else weight[labels]
    return (each * per_bag).sum() / per_bag.sum() if reduction == "mean" else each * per_bag


class MILLoss(nn.Module):
    """The loss that a MIL classifier is trained with: the bag's loss plus the method's own.

    Args:
        network: the classifier, asked for its ``auxiliary_losses``; None trains on the bag's loss alone.
        target: the kind of target.
        class_weights: (C,) weights of the classes; None: all alike.
        label_smoothing: in [0, 1).
    """

    def __init__(
        self,
        network: MILModel | None = None,
        target: str = "multiclass",
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check(target)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        # Kept in a tuple: the loss must not own the network's parameters.
        self._network = (network,)
        self.target = target
        self.label_smoothing = label_smoothing
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", None if class_weights is None else class_weights.float())
        self.parts: dict[str, float] = {}

    def forward(self, output: MILOutput, labels: Tensor) -> Tensor:
        """Scalar loss of a batch of bags; its parts are kept, as numbers, in ``parts``."""
        weight = None if self.class_weights is None else self.class_weights.to(output.logits.device)
        loss = target_loss(output.logits, labels, self.target, weight, self.label_smoothing)
        self.parts = {"bag": float(loss.detach())}
        network = self._network[0]
        if network is not None:
            wanted = indicator(labels, self.target, output.logits.shape[1])
            for name, part in network.auxiliary_losses(output, wanted).items():
                self.parts[name] = float(part.detach())
                loss = loss + part
        return loss
