"""What every multiple-instance classifier shares: one output type, one base class, masked arithmetic."""

# No `from __future__ import annotations` here: TorchScript must be able to read the annotations of MILOutput.

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["MILModel", "MILOutput", "full_mask", "masked_max", "masked_mean", "masked_softmax", "masked_top_mean"]


class MILOutput(NamedTuple):
    """What a classifier says about a batch of bags. K outputs a bag, N tiles a bag, padding included.

    Attributes:
        logits: (B, K) float, before softmax or sigmoid (``targets.Target`` knows which).
        attention: (B, N) float >= 0, sums to one over the tiles of a bag, exactly 0 on padding; None where the method
            has none. For methods with one attention per class, that of the highest logit.
        scores: (B, N, K) float, logits that the method gives to single tiles; 0 on padding; None where it has none.
        class_attention: (B, K, N) attention of every class, for the methods that have one per class.
        extra: (named tensors) what the method's own ``auxiliary_losses`` needs; empty for most.
    """

    logits: Tensor
    attention: Tensor | None
    scores: Tensor | None
    class_attention: Tensor | None
    extra: dict[str, Tensor]


class MILModel(nn.Module):
    """Base of all multiple-instance classifiers: features of a bag's tiles in, ``MILOutput`` out.

    The features are standardised first, with a mean and a deviation that are buffers of the model: they are set once
    from the training slides (``set_standardisation``) and travel with the weights, so that whoever calls the model
    gives it features as the encoder made them. Until they are set they do nothing.

    A subclass implements ``forward_bag(features, mask)``. It must treat tiles outside ``mask`` as absent. It keeps each
    of its constructor's arguments, as plain data, in an attribute of the same name: ``config`` reads them there.

    Args:
        in_features: width D of the features.
        n_outputs: number K of logits.
    """

    order_matters: bool = False
    """True where the method's result depends on the order of the tiles (TransMIL)."""
    closed_form: bool = False
    """True where all is learned in ``learn_bags``, and the logits are made on slides held out in it, for classes of
    equal shares. Nothing is chosen on the validation slides then, and they are learned from as well."""
    takes_marks: bool = False
    """True where ``learn_bags`` learns from cells that somebody marked."""
    __jit_unused_properties__: ClassVar[list[str]] = ["config"]  # what TorchScript need not compile

    def __init__(self, in_features: int, n_outputs: int) -> None:
        super().__init__()
        if in_features < 1 or n_outputs < 1:
            raise ValueError(f"in_features and n_outputs must be at least 1, got {in_features} and {n_outputs}")
        self.in_features = int(in_features)
        self.n_outputs = int(n_outputs)
        self.feature_mean: Tensor
        self.feature_std: Tensor
        self.register_buffer("feature_mean", torch.zeros(in_features))
        self.register_buffer("feature_std", torch.ones(in_features))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> MILOutput:
        """Classify bags.

        Args:
            features: (B, N, D) float, as the encoder made them; what stands on padding does not matter (NaN included).
            mask: (B, N) bool, True on tiles; None when there is no padding. Every bag has at least one tile.

        Returns:
            logits and, where the method has them, attention and tile scores.

        Raises:
            ValueError: when ``features`` is not (B, N, D) with the D of this model.
        """
        if features.dim() != 3 or features.shape[2] != self.in_features:
            raise ValueError(f"features must be (B, N, {self.in_features}), got {list(features.shape)}")
        if mask is None:
            mask = full_mask(features)
        return self.forward_bag(self.standardised(features).masked_fill(~mask.unsqueeze(-1), 0.0), mask)

    def standardised(self, features: Tensor) -> Tensor:
        """Features (..., D), as the encoder made them, less the mean and divided by the deviation; on this device."""
        return (features.to(self.feature_mean) - self.feature_mean) / self.feature_std

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """Classify standardised bags: features (B, N, D), zero on padding; mask (B, N) bool, True on tiles."""
        raise NotImplementedError

    @torch.jit.unused
    def set_standardisation(self, mean: Tensor, std: Tensor) -> None:
        """Set the standardisation of the features.

        Args:
            mean: (D,) mean of the training tiles' features.
            std: (D,) their deviation; where it is almost 0 (a feature that never changes) it is taken as 1.
        """
        std = torch.where(std > 1e-6, std, torch.ones_like(std))
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    @torch.jit.unused
    def learn_bags(
        self,
        bags: Iterable[tuple[Tensor, Any]],
        patients: Sequence[str] | None = None,
        marked: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Learn from the training slides what needs no gradient, once before training; most methods: nothing.

        Args:
            bags: features (N, D), as the encoder made them, and label of each.
            patients: whose slide each is, for methods that hold slides out; None: each is of a patient of its own.
            marked: of each, features (M, D) of its marked cells and their classes (M,) int64, for methods that
                take them (``takes_marks``).
        """

    @torch.jit.unused
    def auxiliary_losses(self, output: MILOutput, indicator: Tensor) -> dict[str, Tensor]:
        """Losses of the method beside the one on ``output.logits``.

        This is the one way in which a method adds a loss: whoever trains it sums the bag's loss and all of these,
        already weighted, and logs them by name.

        Args:
            output: what ``forward`` returned, in training mode.
            indicator: (B, K) float in {0, 1}: which outputs should be on for each bag (``Target.indicator``).

        Returns:
            scalar losses by name; empty for methods without.
        """
        return {}

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-like: with ``_target_`` they rebuild the network (see ``networks/build.py``).

        Raises:
            NotImplementedError: by a subclass that does not keep an argument.
        """
        names = list(inspect.signature(type(self)).parameters)
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise NotImplementedError(
                f"{type(self).__name__} does not keep {', '.join(missing)}; keep every constructor argument in an "
                "attribute of its name, or say them in config"
            )
        return {name: getattr(self, name) for name in names}


def full_mask(features: Tensor) -> Tensor:
    """(B, N) bool mask, all True, for features (B, N, D) without padding."""
    return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)


def masked_softmax(logits: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Softmax over the places where ``mask`` is True; exactly 0 elsewhere, and all 0 where nothing is True.

    Args:
        logits: any shape, float.
        mask: bool, broadcastable to ``logits``.
        dim: the dimension to sum to one over.
    """
    weights = torch.softmax(logits.masked_fill(~mask, float("-inf")), dim=dim)
    # Where nothing is True the softmax is NaN; the fill replaces it here and in the gradient.
    return weights.masked_fill(~mask, 0.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B, C) mean over the tiles of values (B, N, C) where mask (B, N) is True."""
    kept = values.masked_fill(~mask.unsqueeze(-1), 0.0)
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1).to(values.dtype)


def masked_max(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C) maximum over the tiles of values (B, N, C) where mask (B, N) is True, and the tiles' numbers (B, C)."""
    best = values.masked_fill(~mask.unsqueeze(-1), float("-inf")).max(dim=1)
    return best[0], best[1]


def masked_top_mean(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """(B, C) mean over the share of tiles that lead, one at least, of values (B, N, C) where mask (B, N) is True."""
    ordered = values.masked_fill(~mask.unsqueeze(-1), float("-inf")).sort(dim=1, descending=True).values
    count = (mask.sum(dim=1) * share).ceil().long().clamp_min(1).unsqueeze(1)
    counted = torch.arange(mask.shape[1], device=mask.device) < count
    return ordered.masked_fill(~counted.unsqueeze(-1), 0.0).sum(dim=1) / count
