"""Several classifiers as one: the mean of their calibrated probabilities."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cytossl_monai.networks.mil.base import MILModel, MILOutput, full_mask
from cytossl_monai.networks.mil.targets import class_probabilities

__all__ = ["MILEnsemble", "average_probabilities"]


class MILEnsemble(MILModel):
    """Averages the calibrated probabilities of its members, for example the folds of a cross-validation.

    It is a ``MILModel`` itself, so that it is saved, loaded and called like one: its logits are those that give the
    mean probabilities. Attention and tile scores are the members' means. Members keep their own standardisation.

    Args:
        members: ``{"_target_": ..., **arguments}`` of every member's network, or the networks.
        target: kind of target.
        temperatures: of the members; None: all 1.
        biases: (C,) of each member, see ``MILClassifier``; None: none.

    Raises:
        ValueError: without members, or when they differ in width or outputs.
    """

    def __init__(
        self,
        members: Sequence[Mapping[str, Any] | MILModel],
        target: str = "multiclass",
        temperatures: Sequence[float] | None = None,
        biases: Sequence[Sequence[float]] | None = None,
    ) -> None:
        from cytossl_monai.networks.build import build_network

        networks: list[Any] = [m if isinstance(m, MILModel) else build_network(m, MILModel) for m in members]
        if not networks:
            raise ValueError("an ensemble needs at least one member")
        shapes = {(m.in_features, m.n_outputs) for m in networks}
        if len(shapes) > 1:
            raise ValueError(f"the members differ in (in_features, n_outputs): {sorted(shapes)}")
        super().__init__(*shapes.pop())
        self.target = target
        self.members = nn.ModuleList(networks)
        self.order_matters = any(m.order_matters for m in networks)
        self.closed_form = all(m.closed_form for m in networks)
        self.temperatures: Tensor
        self.register_buffer("temperatures", torch.tensor(list(temperatures or [1.0] * len(networks))))
        if len(self.temperatures) != len(networks):
            raise ValueError(f"{len(networks)} members but {len(self.temperatures)} temperatures")
        classes = self.n_outputs + int(target == "ordinal")
        self.biases: Tensor
        self.register_buffer("biases", torch.zeros(len(networks), classes))
        if biases is not None:
            self.biases.copy_(torch.tensor([list(bias) for bias in biases]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(prefix + "biases", torch.zeros_like(self.biases))  # files of before they were kept
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> MILOutput:
        """See ``MILModel.forward``."""
        if mask is None:
            mask = full_mask(features)
        probabilities: list[Tensor] = []
        attention: list[Tensor] = []
        scores: list[Tensor] = []
        for i, member in enumerate(self.members):
            output = member(features, mask)
            probabilities.append(class_probabilities(output.logits / self.temperatures[i], self.target, self.biases[i]))
            if output.attention is not None:
                attention.append(output.attention)
            if output.scores is not None:
                scores.append(output.scores)
        mean = torch.stack(probabilities).mean(dim=0)
        extra: dict[str, Tensor] = {}
        return MILOutput(
            average_probabilities(mean, self.target),
            torch.stack(attention).mean(dim=0) if len(attention) > 0 else None,
            torch.stack(scores).mean(dim=0) if len(scores) > 0 else None,
            None,
            extra,
        )

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """Unused: the members standardise by themselves."""
        return self.forward(features, mask)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        from cytossl_monai.networks.build import network_config

        members = [network_config(member) for member in self.members if isinstance(member, MILModel)]
        return {
            "members": members,
            "target": self.target,
            "temperatures": self.temperatures.tolist(),
            "biases": self.biases.tolist(),
        }


def average_probabilities(probabilities: Tensor, target: str) -> Tensor:
    """Logits (B, K) whose ``class_probabilities`` are these probabilities (B, C)."""
    p = probabilities.clamp(1e-7, 1.0 - 1e-7)
    if target == "multiclass":
        return torch.log(p)
    if target == "multilabel":
        return torch.log(p) - torch.log1p(-p)
    # Ordinal: logit k is that of P(y > k | y >= k).
    reached = torch.flip(torch.cumsum(torch.flip(p, [1]), dim=1), [1])
    step = (reached[:, 1:] / reached[:, :-1]).clamp(1e-7, 1.0 - 1e-7)
    return torch.log(step) - torch.log1p(-step)
