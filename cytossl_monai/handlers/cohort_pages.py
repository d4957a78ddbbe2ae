"""What closes a run of inference: the list of slides, the table of predictions, and the exit status."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from cytossl_monai.inference.merge import write_predictions
from cytossl_monai.utils.report import RunReport
from cytossl_monai.utils.shard import ALL, Shard
from cytossl_monai.visualize.cohort_page import write_cohort_page

__all__ = ["CohortPages"]


class CohortPages:
    """Ignite handler: ``predictions.csv`` and ``index.html`` from the slides' prediction.json, once all are written.

    Args:
        output_dir: folder of the slides' folders; both files go there.
        items: the run's items (``slide_id``); the pages list these slides, whatever else lies in the folder.
        report: the run's report, for the reasons of those that failed.
        shard: the run's part of the slides. Where it is not all of them, ``merge.json`` writes both files later.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        items: Sequence[dict[str, Any]],
        report: RunReport,
        shard: Shard = ALL,
    ) -> None:
        self.output_dir, self.report, self.shard = Path(output_dir), report, shard
        self.slide_ids = [item["slide_id"] for item in items]

    def attach(self, engine: Engine) -> None:
        """Write when all slides are written, see `SlideEvaluator`."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write both files."""
        del engine
        if self.shard.count > 1:
            return
        failed = {item.item: item.message for item in self.report.items if item.status == "failed"}
        answers = []
        for slide_id in self.slide_ids:
            if slide_id not in failed:
                text = (self.output_dir / slide_id / "prediction.json").read_text(encoding="utf-8")
                answers.append(json.loads(text))
        write_predictions(self.output_dir / "predictions.csv", answers, failed)
        write_cohort_page(self.output_dir / "index.html", answers, failed)
