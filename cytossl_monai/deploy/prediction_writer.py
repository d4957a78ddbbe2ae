"""The exported model's answer and the evidence for it, as files: the last step of an application."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cytossl_monai.inference.evidence import USUAL, SlideEvidence
from cytossl_monai.utils.errors import CheckpointError
from cytossl_monai.utils.files import sha256_file, write_json

__all__ = ["TOLERANCE", "PredictionWriter"]

TOLERANCE = 1e-4
"""Largest difference between a probability of the exported model and the bundle's own."""


class PredictionWriter:
    """Write a slide's prediction and report to ``output_dir/<slide_id>/``, as the bundle ``cytossl_inference`` does.

    The probabilities come from the exported model, the evidence (attention, tile scores) from the classifier file,
    which holds the same weights. Should the two disagree, nothing is written: a report must explain the prediction
    that was served.

    Args:
        model: the exported ``model.ts``.
        classifier: classifier file that it was exported from.
        output_dir: folder of the slides' folders.
        encoder: the encoder, as `SlideToBag` has it.
        encoder_hash: its hash.
        files: which of ``EVIDENCE`` to write.

    Raises:
        CheckpointError: when classifier and encoder do not belong together.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        classifier: str | os.PathLike[str],
        output_dir: str | os.PathLike[str],
        encoder: nn.Module,
        encoder_hash: str,
        files: Sequence[str] = USUAL,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.evidence = SlideEvidence(classifier, output_dir, files)
        self.evidence.prepare(encoder, encoder_hash)
        self.model = Path(model)
        self._model_hash = sha256_file(model)

    def __call__(self, item: Mapping[str, Any], probabilities: np.ndarray) -> dict[str, Any]:
        """Write one slide.

        Args:
            item: of `SlideToBag`.
            probabilities: (C,) of the exported model; not looked at where the slide has no features.

        Returns:
            the content of ``prediction.json``; without a label where no cells were found; empty where the slide failed.

        Raises:
            CheckpointError: when the exported model and the classifier disagree.
        """
        if item.get("problem", ("",))[0] == "failed":
            return {}
        served = None
        if "problem" not in item:
            served = self._agreed(item, np.asarray(probabilities, np.float64).reshape(-1))
        answer: dict[str, Any] = self.evidence(item)["answer"]
        answer["deploy"] = {"model": str(self.model), "sha256": self._model_hash, "probabilities": served}
        write_json(self.output_dir / item["slide_id"] / "prediction.json", answer)
        return answer

    def _agreed(self, item: Mapping[str, Any], served: np.ndarray) -> dict[str, float]:
        classifier = self.evidence.classifier
        assert classifier is not None, "prepare() has loaded it"
        own = classifier.predict(item["features"], item["encoder"], str(item["record"].path)).probabilities
        if len(served) != len(own) or not np.allclose(served, list(own.values()), rtol=0, atol=TOLERANCE):
            raise CheckpointError(
                f"{self.model} gives {np.round(served, 4).tolist()} for {item['slide_id']}, but {classifier.files[0]} "
                f"gives {[round(p, 4) for p in own.values()]}; export the model again from this classifier"
            )
        return dict(zip(own, served.tolist()))
