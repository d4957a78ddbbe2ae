"""Predicting slides from their feature files, where one unusable file costs only itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytossl_monai.data.bags.choice import TilesPerSlided
from cytossl_monai.data.bags.dataset import BagDataset
from cytossl_monai.data.bags.features import read_features
from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.engines.mil.trainer import bag_loader
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.utils.errors import FeatureError
from cytossl_monai.utils.files import visible_files
from cytossl_monai.utils.report import RunReport

__all__ = ["inference_items", "predict_items"]

Item = dict[str, Any]


def inference_items(
    features_dir: str | os.PathLike[str],
    classifier: MILClassifier,
    slides: str | os.PathLike[str] | None = None,
    report: RunReport | None = None,
) -> list[Item]:
    """Slides whose features the classifier can take; the others go into the report, with the reason.

    Args:
        features_dir: folder of ``<slide_id>.h5``.
        classifier: whose encoder the features must come from.
        slides: slide table that says which slides; None: every file of the folder.
        report: where each slide is told.

    Returns:
        items for ``BagDataset``, without labels.

    Raises:
        FeatureError: when no slide is usable.
    """
    report = RunReport("classify") if report is None else report
    folder = Path(features_dir)
    if slides is None:
        items: list[Item] = [
            {"slide_id": p.stem, "patient_id": p.stem, "features": str(p)} for p in visible_files(folder, "*.h5")
        ]
    else:
        items = [
            {"slide_id": r.slide_id, "patient_id": r.patient_id, "features": str(folder / f"{r.slide_id}.h5")}
            for r in read_slide_table(slides)
        ]
    usable = []
    for item in items:
        try:
            bag = read_features(item["features"])
            classifier.check_features(bag.features.shape[1], bag.encoder, f"feature file {item['features']}")
        except FeatureError as error:
            report.add(item["slide_id"], "failed", str(error))
            continue
        report.add(item["slide_id"], "done", f"{len(bag)} tiles")
        usable.append(item)
    if not usable:
        report.save()
        reason = f": {report.left_out[0].message}" if report.left_out else ""
        raise FeatureError(f"no usable feature file in {folder}{reason}")
    return usable


def predict_items(
    classifier: MILClassifier, items: Sequence[Item], device: str | torch.device = "cpu", batch_size: int = 1
) -> tuple[np.ndarray, torch.Tensor]:
    """Predict slides, by the choice of their tiles that the classifier was trained with.

    Args:
        classifier: in ``eval()`` mode.
        items: items for ``BagDataset``.
        device: where to compute.
        batch_size: bags at a time.

    Returns:
        probabilities (n, C) and logits (n, K).
    """
    classifier = classifier.to(device).eval()
    choice = TilesPerSlided(*classifier.tile_choice)
    loader = bag_loader(BagDataset(items, encoder=classifier.encoder, cache_gb=0.0, choice=choice), batch_size)
    probabilities, logits = [], []
    for batch in loader:
        prediction = classifier.predict(batch["features"].to(device), batch["mask"].to(device))
        probabilities.append(prediction.probabilities.float().cpu().numpy())
        logits.append(prediction.output.logits.float().cpu())
    return np.concatenate(probabilities), torch.cat(logits)
