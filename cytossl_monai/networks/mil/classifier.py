"""A trained slide classifier: network, calibration and meaning of its outputs in one module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cytossl_monai.networks.mil.base import MILModel, MILOutput
from cytossl_monai.networks.mil.targets import TARGETS, class_probabilities, n_outputs
from cytossl_monai.utils.errors import FeatureError

__all__ = ["MILClassifier", "MILPrediction"]


@dataclass(frozen=True)
class MILPrediction:
    """Prediction for a batch of bags.

    Args:
        probabilities: (B, C) float, calibrated.
        output: the network's own output: logits, attention, tile scores.
    """

    probabilities: Tensor
    output: MILOutput


class MILClassifier(nn.Module):
    """Bags of features in, calibrated class probabilities out: one tensor each way, so that it exports.

    Args:
        network: any ``MILModel``.
        classes: names of the C classes, grades (lowest first) or findings.
        target: what the logits mean, see ``targets.TARGETS``.
        temperature: the logits are divided by it before softmax or sigmoid; 1 where nothing was calibrated.
        encoder: ``hash``, ``name`` and ``dim`` of the encoder whose features it takes; a hash of None takes any.
        meta: anything else to keep with it: folds, metrics, data version.

    Raises:
        ValueError: when classes, target and the network's outputs do not belong together.
    """

    def __init__(
        self,
        network: MILModel,
        classes: Sequence[str],
        target: str = "multiclass",
        temperature: float = 1.0,
        encoder: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"target must be one of {TARGETS}, not {target!r}")
        wanted = n_outputs(target, len(classes))
        if network.n_outputs != wanted:
            raise ValueError(
                f"{len(classes)} {target} classes take {wanted} logits, the network has {network.n_outputs}"
            )
        self.network = network
        self.target = target
        self.classes = [str(name) for name in classes]
        self.encoder = {"hash": None, "name": None, "dim": network.in_features, **(encoder or {})}
        self.meta = dict(meta or {})
        self.trained = False
        """True once weights were trained or loaded: a classifier without may be exported, never believed."""
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities (B, C) of bags (B, N, D).

        Args:
            image: (B, N, D) float features. MONAI's checks know a network's input by the name ``image`` only.
            mask: (B, N) bool, True on tiles; None when there is no padding.
        """
        return class_probabilities(self.network(image, mask).logits / self.temperature, self.target)

    @torch.jit.unused
    @torch.no_grad()
    def predict(self, features: Tensor, mask: Tensor | None = None) -> MILPrediction:
        """Probabilities with the evidence: attention and tile scores. The module should be in ``eval()``."""
        output = self.network(features, mask)
        return MILPrediction(class_probabilities(output.logits / self.temperature, self.target), output)

    @torch.jit.unused
    def check_features(self, dim: int, encoder: str | None, where: str) -> None:
        """Refuse features that another encoder made.

        Args:
            dim: width of the features.
            encoder: hash of their encoder, None when unknown (files from elsewhere): then the width alone is checked.
            where: file or slide, for the message.

        Raises:
            FeatureError: when width or hash differ from what the classifier was trained on.
        """
        known = self.encoder
        told = f"{known['name'] or known['hash'] or 'the encoder of training'} ({known['dim']} features)"
        if dim != known["dim"]:
            raise FeatureError(
                f"{where} has {dim} features a tile, the classifier was trained on {told}; embed the slide with that "
                "encoder"
            )
        if encoder is not None and known["hash"] is not None and encoder != known["hash"]:
            raise FeatureError(
                f"{where} was made by the encoder {encoder}, the classifier was trained on {told}, hash "
                f"{known['hash']}; embed the slide with that encoder"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in ``nn.Module``, and also takes a whole checkpoint of ``save_classifier`` (MONAI's export gives that)."""
        if "format" in state_dict and "state_dict" in state_dict:
            state_dict = state_dict["state_dict"]
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self.trained = True
        return result
