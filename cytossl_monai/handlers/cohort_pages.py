"""What closes a run of inference: the list of slides, the table of predictions, and the exit status."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from ignite.engine import Engine, Events

from cytossl_monai.utils.cells import plain_cell
from cytossl_monai.utils.files import atomic_path
from cytossl_monai.utils.report import RunReport
from cytossl_monai.visualize.cohort_page import write_cohort_page

__all__ = ["CohortPages"]


class CohortPages:
    """Ignite handler: ``predictions.csv`` and ``index.html`` from the slides' prediction.json, once all are written.

    Args:
        output_dir: folder of the slides' folders; both files go there.
        items: the run's items (``slide_id``); the pages list these slides, whatever else lies in the folder.
        report: the run's report, for the reasons of those that failed.
    """

    def __init__(self, output_dir: str | os.PathLike[str], items: Sequence[dict[str, Any]], report: RunReport) -> None:
        self.output_dir, self.report = Path(output_dir), report
        self.slide_ids = [item["slide_id"] for item in items]

    def attach(self, engine: Engine) -> None:
        """Write when all slides are written, see `SlideEvaluator`."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write both files."""
        del engine
        failed = {item.item: item.message for item in self.report.items if item.status == "failed"}
        answers = []
        for slide_id in self.slide_ids:
            if slide_id not in failed:
                told = (self.output_dir / slide_id / "prediction.json").read_text(encoding="utf-8")
                answers.append(json.loads(told))
        write_predictions(self.output_dir / "predictions.csv", answers, failed)
        write_cohort_page(self.output_dir / "index.html", answers, failed)


def write_predictions(path: Path, answers: Sequence[dict[str, Any]], failed: dict[str, str]) -> Path:
    """One line a slide, most suspicious first: ``slide_id, patient_id, status, label, suspicion, prob_<class>...``."""
    rows = [
        {
            "slide_id": a["slide_id"],
            "patient_id": a["patient_id"],
            "status": a["status"],
            "label": a["label"],
            "suspicion": a["suspicion"],
            **{f"prob_{name}": p for name, p in (a["probabilities"] or {}).items()},
        }
        for a in sorted(answers, key=lambda a: (a["label"] is None, -(a["suspicion"] or 0.0), a["slide_id"]))
    ]
    rows += [{"slide_id": name, "status": "failed"} for name in sorted(failed)]
    with atomic_path(path) as partial:
        pd.DataFrame(rows).map(plain_cell).to_csv(partial, index=False)
    return path
