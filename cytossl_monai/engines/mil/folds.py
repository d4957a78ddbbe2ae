"""One fold of a cross-validation: trained in a process of its own, kept, and not done twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cytossl_monai.engines.bundle import run_training
from cytossl_monai.engines.mil.predict import predict_items
from cytossl_monai.networks.files import load_classifier
from cytossl_monai.utils.errors import CheckpointError
from cytossl_monai.utils.files import file_fingerprint, sha256_file, write_json
from cytossl_monai.utils.program import plain_cause

__all__ = ["FoldRun", "finished", "fold_stamp", "run_fold"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoldRun:
    """What the process of a fold needs.

    Args:
        number: of the fold that is held out.
        repeat: of the repeat that it belongs to, from 0.
        files: configurations of the training, later ones over earlier ones.
        overrides: values to set in them.
        data: what the cross-validation gives: table, features, folds, seed.
        folder: where to write.
        held_out: the slides to judge.
        stamp: digest of all that the result depends on.
    """

    number: int
    repeat: int
    files: tuple[str, ...]
    overrides: dict[str, Any]
    data: dict[str, Any]
    folder: str
    held_out: tuple[dict[str, Any], ...]
    stamp: str

    def __str__(self) -> str:
        return f"fold {self.number} of repeat {self.repeat}" if self.repeat else f"fold {self.number}"


def run_fold(fold: FoldRun) -> int:
    """Train a fold and judge its slides; its number. Its ``fold.json`` is written last: a fold with it is whole."""
    folder = Path(fold.folder)
    model = folder / "model.pt"
    (folder / "fold.json").unlink(missing_ok=True)  # what it tells is no longer that of the model
    try:
        run_training(fold.files, fold.overrides, {**fold.data, "output_dir": str(folder), "model_path": str(model)})
    except Exception as error:  # noqa: BLE001 - raised again, unwrapped
        raise plain_cause(error) from None  # MONAI wraps it, and a process hands on the outermost alone
    classifier = load_classifier(model)
    probabilities, logits = predict_items(classifier, fold.held_out)
    write_json(
        folder / "fold.json",
        {
            "stamp": fold.stamp,
            "model": sha256_file(model),
            "fold": fold.number,
            "slides": [item["slide_id"] for item in fold.held_out],
            "probabilities": probabilities.astype(float).tolist(),
            "logits": logits.double().tolist(),
            "temperature": float(classifier.temperature),
            "bias": classifier.bias.tolist(),
            "validation": classifier.meta.get("validation"),
        },
    )
    return fold.number


def finished(fold: FoldRun) -> dict[str, Any] | None:
    """What a fold left, when it was finished with the same data and settings; None otherwise."""
    path, model = Path(fold.folder) / "fold.json", Path(fold.folder) / "model.pt"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["stamp"] != fold.stamp:
            return None
        if not model.is_file() or content["model"] != sha256_file(model):
            raise CheckpointError(f"{model} is not the model that {path} tells of")
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is done again: %s", fold, error)
        return None
    return dict(content)


def fold_stamp(
    files: Sequence[str], settings: Mapping[str, Any], items: Sequence[dict[str, Any]], folds: np.ndarray
) -> str:
    """Digest of all that a fold's result depends on."""
    content = {
        "files": [file_fingerprint(path) for path in files],
        "settings": dict(settings),
        "items": [
            [i["slide_id"], i["patient_id"], np.asarray(i["label"]).tolist(), file_fingerprint(i["features"]), int(f)]
            + ([i["marks"]] if i.get("marks") else [])
            for i, f in zip(items, folds)
        ],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
