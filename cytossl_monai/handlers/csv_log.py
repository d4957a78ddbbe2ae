"""Every logged figure as one line of a CSV: step, epoch, figure, value."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from ignite.engine import Events

from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.metrics.logged import HEADER, read_log, scalars
from cytossl_monai.utils.distributed import is_main
from cytossl_monai.utils.files import atomic_path, writing

__all__ = ["CSVLog"]


class CSVLog:
    """Appends the figures of a step every ``every_steps`` steps, and whatever handlers report, as it comes.

    One line a figure, because figures come at different times: ``table.pivot(index="step", columns="figure",
    values="value")`` of pandas makes columns of it. A resumed run first takes out what lies after its step.

    Args:
        path: the file.
        every_steps: steps between two lines of the loss and its parts; the last step is always logged.
    """

    def __init__(self, path: str | os.PathLike[str], every_steps: int = 10) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}")
        self.path, self.every_steps = Path(path), every_steps

    def attach(self, engine: SSLTrainer) -> None:
        """Log steps and reports of a trainer."""
        if not is_main():
            return
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.sinks.append(self.write)

    def _start(self, engine: SSLTrainer) -> None:
        kept = (
            [row for row in read_log(self.path) if row[0] <= engine.state.iteration] if engine.state.iteration else []
        )
        with atomic_path(self.path) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(HEADER)
            writer.writerows(kept)

    def _step(self, engine: SSLTrainer) -> None:
        step = engine.state.iteration
        if step % self.every_steps == 0 or step == engine.total_steps or step == 1:
            self.write(step, engine.state.epoch, scalars(engine.state.output))

    def write(self, step: int, epoch: int, figures: dict[str, float]) -> None:
        """Append figures; the file is closed in between, so that a killed run loses none."""
        with writing(self.path), open(self.path, "a", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows((step, epoch, name, repr(value)) for name, value in figures.items())
