"""A trained slide classifier: network, calibration and meaning of its outputs in one module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cytossl_monai.networks.mil.base import MILModel, MILOutput
from cytossl_monai.networks.mil.targets import TARGETS, class_probabilities, n_outputs, prior_shift
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
        bias: (C,) added after that; see ``class_probabilities``. It takes back that classes were drawn in balance in
            training. None: none.
        prevalence: (C,) share of each class that the probabilities stand for; None: unknown, where nothing was
            calibrated.
        encoder: ``hash``, ``name`` and ``dim`` of the encoder whose features it takes; a hash of None takes any.
        meta: anything else to keep with it: folds, metrics, data version.

    Raises:
        ValueError: when classes, target and the network's outputs do not belong together.
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["tile_choice"]

    def __init__(
        self,
        network: MILModel,
        classes: Sequence[str],
        target: str = "multiclass",
        temperature: float = 1.0,
        bias: Sequence[float] | None = None,
        prevalence: Sequence[float] | None = None,
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
        nothing = [0.0] * len(self.classes)
        self.bias: Tensor
        self.register_buffer("bias", torch.tensor(list(nothing if bias is None else bias), dtype=torch.float32))
        self.prevalence: Tensor
        """(C,) what the probabilities stand for; zeros where it is unknown."""
        known = nothing if prevalence is None else prevalence
        self.register_buffer("prevalence", torch.tensor(list(known), dtype=torch.float32))
        if len(self.bias) != len(self.classes) or len(self.prevalence) != len(self.classes):
            raise ValueError(f"bias and prevalence must have one number for each of the {len(self.classes)} classes")

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities (B, C) of bags (B, N, D).

        Args:
            image: (B, N, D) float features. MONAI's checks know a network's input by the name ``image`` only.
            mask: (B, N) bool, True on tiles; None when there is no padding.
        """
        return class_probabilities(self.network(image, mask).logits / self.temperature, self.target, self.bias)

    @torch.jit.unused
    @torch.no_grad()
    def predict(self, features: Tensor, mask: Tensor | None = None) -> MILPrediction:
        """Probabilities with the evidence: attention and tile scores. The module should be in ``eval()``."""
        output = self.network(features, mask)
        return MILPrediction(self.probabilities(output.logits), output)

    @torch.jit.unused
    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities (B, C) of the network's logits (B, K)."""
        return class_probabilities(logits / self.temperature, self.target, self.bias)

    @property
    def tile_choice(self) -> tuple[int | None, int]:
        """How many tiles of a slide it was trained on, None for all, and the seed that chose them."""
        number, seed = self.meta.get("tile_choice", (None, 0))
        return number, seed

    @torch.jit.unused
    def set_prevalence(self, prevalence: Sequence[float]) -> None:
        """Let the probabilities stand for a place where classes have these shares, by Bayes' rule.

        The decision moves with them: where a lesion is rare, more evidence is asked for.

        Args:
            prevalence: (C,) share of each class, summing to one (``multilabel``: of the slides with each finding).

        Raises:
            ValueError: when they are not C shares, or it is not known what the probabilities stand for now.
        """
        wanted = self.check_prevalence(prevalence)
        if not bool((self.prevalence > 0).all()):
            raise ValueError(
                "this classifier does not say which prevalence its probabilities stand for: it was trained without "
                "calibration, or before version 0.2; train it again with calibrate on"
            )
        device = self.bias.device
        self.bias += prior_shift(self.prevalence.cpu(), wanted.float(), self.target).float().to(device)
        self.prevalence.copy_(wanted)

    @torch.jit.unused
    def check_prevalence(self, prevalence: Sequence[float]) -> Tensor:
        """The shares as a tensor (C,) float64.

        Raises:
            ValueError: when they are not one share for each class, summing to one (``multilabel``: each of its own).
        """
        wanted = torch.tensor([float(share) for share in prevalence], dtype=torch.float64)
        sums = self.target == "multilabel" or abs(float(wanted.sum()) - 1.0) < 1e-3
        if len(wanted) != len(self.classes) or not bool(((wanted > 0) & (wanted < 1)).all()) or not sums:
            raise ValueError(
                f"prevalence must give the share of each of {self.classes}, between 0 and 1"
                f"{'' if self.target == 'multilabel' else ' and summing to 1'}; got {list(prevalence)}"
            )
        return wanted

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
        trained_on = f"{known['name'] or known['hash'] or 'the encoder of training'} ({known['dim']} features)"
        if dim != known["dim"]:
            raise FeatureError(
                f"{where} has {dim} features a tile, the classifier was trained on {trained_on}; embed the slide with "
                "that encoder"
            )
        if encoder is not None and known["hash"] is not None and encoder != known["hash"]:
            raise FeatureError(
                f"{where} was made by the encoder {encoder}, the classifier was trained on {trained_on}, hash "
                f"{known['hash']}; embed the slide with that encoder"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in ``nn.Module``, and also takes a whole checkpoint of ``save_classifier`` (MONAI's export gives that)."""
        if "format" in state_dict and "state_dict" in state_dict:
            state_dict = state_dict["state_dict"]
        # Files of before biases were kept stand for the prior of training, whatever that was.
        added = {key: torch.zeros_like(getattr(self, key)) for key in ("bias", "prevalence") if key not in state_dict}
        state_dict = {**state_dict, **added}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self.trained = True
        return result
