"""What an evaluation leaves behind: predictions.csv, metrics.json, ROC and confusion matrix, attention tables."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ignite.engine import Engine, Events
from monai.utils.enums import CommonKeys as Keys

from cytossl_monai.engines.mil.evaluation import prediction_table, write_evaluation
from cytossl_monai.metrics.bootstrap import Interval
from cytossl_monai.networks.mil.classifier import MILPrediction
from cytossl_monai.utils.cells import plain_cell
from cytossl_monai.utils.files import atomic_path

__all__ = ["PredictionReport"]

logger = logging.getLogger(__name__)


class PredictionReport:
    """Handler of an evaluator: collects the predictions and writes them when it has seen all.

    With labels: everything of ``write_evaluation``. Without: ``predictions.csv`` alone. With ``attention`` also one
    Parquet table a slide, ``attention/<slide_id>.parquet`` with ``x, y, attention`` and ``score_<class>``, where the
    method has them.

    Args:
        output_dir: where to.
        classes: names of the classes.
        target: kind of target.
        attention: write the tables of the tiles.
        n_resamples: draws of the bootstrap.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        classes: Sequence[str],
        target: str = "multiclass",
        attention: bool = False,
        n_resamples: int = 2000,
    ) -> None:
        self.output_dir, self.classes, self.target = Path(output_dir), list(classes), target
        self.attention, self.n_resamples = attention, n_resamples
        self.intervals: dict[str, Interval] = {}
        self._clear()

    def _clear(self) -> None:
        self._slides: list[str] = []
        self._patients: list[str] = []
        self._probabilities: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose inferer is ``BagInferer``."""
        engine.add_event_handler(Events.STARTED, lambda _: self._clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Engine) -> None:
        batch, prediction = engine.state.batch, engine.state.output[Keys.PRED]
        self._slides += batch["slide_id"]
        self._patients += batch["patient_id"]
        self._probabilities.append(prediction.probabilities.float().cpu().numpy())
        if "label" in batch:
            self._labels.append(batch["label"].cpu().numpy())
        if self.attention:
            self._write_tiles(batch, prediction)

    def _write_tiles(self, batch: dict[str, Any], prediction: MILPrediction) -> None:
        output = prediction.output
        for row, slide in enumerate(batch["slide_id"]):
            kept = batch["mask"][row].cpu()
            places = batch["coords"][row][kept].numpy()
            columns: dict[str, Any] = {"x": places[:, 0], "y": places[:, 1]}
            if output.attention is not None:
                columns["attention"] = output.attention[row].float().cpu()[kept].numpy()
            if output.scores is not None:
                scores = output.scores[row].float().cpu()[kept].numpy()
                names = self.classes if scores.shape[1] == len(self.classes) else [f"above_{c}" for c in self.classes]
                columns |= {f"score_{name}": scores[:, k] for k, name in enumerate(names[: scores.shape[1]])}
            with atomic_path(self.output_dir / "attention" / f"{slide}.parquet") as partial:
                pd.DataFrame(columns).to_parquet(partial, index=False)

    def _write(self, engine: Engine) -> None:
        if not self._slides:
            return
        probabilities = np.concatenate(self._probabilities)
        if self._labels and sum(map(len, self._labels)) == len(self._slides):
            labels = np.concatenate(self._labels)
            self.intervals = write_evaluation(
                self.output_dir, self._slides, self._patients, labels, probabilities, self.classes, self.target,
                self.n_resamples,
            )  # fmt: skip
            return
        table = prediction_table(self._slides, self._patients, probabilities, self.classes, self.target)
        with atomic_path(self.output_dir / "predictions.csv") as partial:
            table.map(plain_cell).to_csv(partial, index=False, float_format="%.6f")
