"""Features of one slide to its prediction, with what every tile contributed; one classifier or an ensemble of folds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytossl_monai.data.bags.seen import seen_items
from cytossl_monai.data.slide_table import known_negative
from cytossl_monai.networks.describe import describe_classifier
from cytossl_monai.networks.files import load_classifier, require_trained
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.mil.targets import decide
from cytossl_monai.utils.errors import CheckpointError, FeatureError
from cytossl_monai.utils.files import sha256_file
from cytossl_monai.visualize.heatmap import display_scale

__all__ = ["SlideClassifier", "SlidePrediction"]

_TILE_BATCH = 8192


@dataclass(frozen=True)
class SlidePrediction:
    """What the classifier says about a slide.

    Args:
        label: the most probable class, for grades (``ordinal``) the median one; for findings (``multilabel``) those
            above one half, joined by "+", or "none".
        probabilities: calibrated probability of each class.
        suspicion: in [0, 1], one minus the probability of the negative class; for findings the largest probability.
        attention: (N,) float32, sums to one; equal shares where the method has no attention.
        score: (N,) float32 in [0, 1], the suspicion of each tile as if it were the whole slide.
        has_attention: whether the attention is the method's own.
        spread: standard deviation of the suspicion between the members of an ensemble; 0 for one classifier.
    """

    label: str
    probabilities: dict[str, float]
    suspicion: float
    attention: np.ndarray
    score: np.ndarray
    has_attention: bool
    spread: float = 0.0

    @property
    def evidence(self) -> np.ndarray:
        """(N,) float32 >= 0, attention x score: what a tile brings to the suspicion.

        Attention alone also marks tiles that speak for the negative class, the score alone also tiles that the slide's
        verdict hardly rests on. The sum over the slide is at most one.
        """
        return (self.attention * self.score).astype(np.float32)

    @property
    def shown(self) -> np.ndarray:
        """(N,) float32 in [0, 1], the evidence for display: relative attention times absolute score, by square root.

        A slide without anything suspicious stays pale: the score is not stretched.
        """
        if not self.has_attention:
            return np.sqrt(self.score).astype(np.float32)
        return (display_scale(self.attention) * np.sqrt(self.score)).astype(np.float32)


class SlideClassifier:
    """One or more MIL classifiers of the same classes; an ensemble averages probabilities and attention.

    Args:
        paths: classifier files of `save_classifier`.
        device: where to compute.
        negative_class: the class that means "nothing suspicious"; None looks for one of
            ``data.slide_table.NEGATIVE_NAMES``, else
            takes the first.
        prevalence: share of each class where the slides come from; None: those that the classifier was trained for.

    Raises:
        CheckpointError: when a file cannot be loaded, or the files have different classes or encoders.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        device: str | torch.device = "cpu",
        negative_class: str | None = None,
        prevalence: Sequence[float] | None = None,
    ) -> None:
        files = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
        if not files:
            raise CheckpointError("no classifier given; train one or give its path")
        self.files = files
        self.members: list[MILClassifier] = []
        for file in files:
            member = load_classifier(file, device)
            require_trained(member, file)
            if prevalence is not None:
                try:
                    member.set_prevalence(prevalence)
                except ValueError as error:
                    raise CheckpointError(f"{file}: {error}") from error
            self.members.append(member)
        first = self.members[0]
        for file, member in zip(files, self.members):
            if member.classes != first.classes or member.target != first.target:
                raise CheckpointError(f"{file} has the classes {member.classes}, {files[0]} has {first.classes}")
            if member.encoder["hash"] != first.encoder["hash"] or member.encoder["dim"] != first.encoder["dim"]:
                raise CheckpointError(f"{file} was trained on another encoder than {files[0]}; use folds of one study")
        self.device = torch.device(device)
        self.classes, self.target, self.encoder = first.classes, first.target, first.encoder
        self.negative = self._negative(negative_class)

    def _negative(self, name: str | None) -> int:
        if name is not None:
            name = str(name)  # a command line makes a number of 0
            if name not in self.classes:
                raise CheckpointError(f"the class {name!r} is unknown to {self.files[0]}: it has {self.classes}")
            return self.classes.index(name)
        known = known_negative(self.classes)
        return 0 if known is None else self.classes.index(known)

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of the classifier files."""
        return hashlib.sha256("".join(sha256_file(file) for file in self.files).encode()).hexdigest()[:16]

    @property
    def calibrated(self) -> bool:
        """Whether every member was calibrated on slides it was not trained on."""
        # An ensemble's network keeps the temperatures of its members and has none of its own.
        # A method in closed form calibrates itself, on slides that it holds out.
        own = [
            getattr(member.network, "temperatures", member.temperature)
            for member in self.members
            if not member.network.closed_form
        ]
        return all(bool((temperature != 1.0).all()) for temperature in own)

    @property
    def versions(self) -> list[dict[str, Any]]:
        """File, method and encoder of each member, for the record."""
        return [
            {"file": str(file), "method": describe_classifier(member.network), "encoder": member.encoder}
            for file, member in zip(self.files, self.members)
        ]

    def has_seen(self, slide_id: str, patient_id: str) -> bool:
        """Whether a member was trained, chosen or calibrated on this slide or another of its patient, as far as known.

        Args:
            slide_id: as in the slide table of training.
            patient_id: the same.
        """
        item = {"slide_id": slide_id, "patient_id": patient_id}
        parts = ("learned", "chosen")
        return any(seen_items([item], member.meta.get("seen"), part) for member in self.members for part in parts)

    def suspicion(self, probabilities: np.ndarray) -> np.ndarray:
        """Suspicion (...) of probabilities (..., C)."""
        if self.target == "multilabel":
            return np.asarray(probabilities.max(-1))
        # Summed, not taken from one: between tiles that are all but certainly negative the order stays.
        return np.asarray(np.delete(probabilities, self.negative, -1).sum(-1))

    @torch.inference_mode()
    def predict(self, features: np.ndarray, encoder: str | None, where: str) -> SlidePrediction:
        """Classify one slide.

        Args:
            features: (N, D) of its tiles.
            encoder: hash of the encoder that made them; None when unknown.
            where: file or slide, for messages.

        Raises:
            FeatureError: when they are empty, not finite, or of another encoder.
        """
        if features.ndim != 2 or not len(features):
            raise FeatureError(f"{where} is an empty bag: it has no tile to classify")
        if not np.isfinite(features).all():
            raise FeatureError(f"{where} holds NaN or infinite features; embed the slide again")
        values = torch.from_numpy(np.ascontiguousarray(features, np.float32)).to(self.device)
        probabilities, attentions, scores = [], [], []
        for member in self.members:
            member.check_features(features.shape[1], encoder, where)
            prediction = member.predict(values[None])
            probabilities.append(prediction.probabilities[0].double().cpu().numpy())
            if prediction.output.attention is not None:
                attentions.append(prediction.output.attention[0].float().cpu().numpy())
            scores.append(self.suspicion(self._alone(member, values)))
        mean = np.mean(probabilities, 0)
        attention = np.mean(attentions, 0) if attentions else np.full(len(features), 1 / len(features))
        return SlidePrediction(
            label=self._label(mean),
            probabilities={name: float(p) for name, p in zip(self.classes, mean)},
            suspicion=float(self.suspicion(mean)),
            attention=attention.astype(np.float32),
            score=np.mean(scores, 0).astype(np.float32),
            has_attention=bool(attentions),
            spread=float(np.std([self.suspicion(p) for p in probabilities])),
        )

    @staticmethod
    def _alone(member: MILClassifier, values: torch.Tensor) -> np.ndarray:
        """(N, C) probabilities of every tile as a bag of one."""
        parts = []
        for start in range(0, len(values), _TILE_BATCH):
            output = member.network(values[start : start + _TILE_BATCH, None])
            parts.append(member.probabilities(output.logits).double().cpu().numpy())
        return np.concatenate(parts)

    def _label(self, probabilities: np.ndarray) -> str:
        if self.target == "multilabel":
            present = [name for name, p in zip(self.classes, probabilities) if p >= 0.5]
            return "+".join(present) or "none"
        # As everywhere else: the most probable class, the median grade of an ordinal target.
        return self.classes[int(decide(torch.from_numpy(probabilities)[None], self.target)[0])]
