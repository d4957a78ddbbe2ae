"""A progress bar with the loss and the time that is left."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from ignite.engine import Events
from tqdm import tqdm

from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.utils.distributed import is_main

__all__ = ["ProgressBar"]


class ProgressBar:
    """One bar over all steps of the run; a resumed run goes on where it stood.

    Args:
        every_steps: steps between two updates of the loss (on CUDA, reading it waits for the device).
        description: text before the bar.
        stream: where to draw; default: standard error. Into a file, one line a minute instead of a bar.
    """

    def __init__(self, every_steps: int = 10, description: str = "pretrain", stream: TextIO | None = None) -> None:
        self.every_steps, self.description, self.stream = max(1, every_steps), description, stream
        self._bar: Any = None
        self._figures: dict[str, str] = {}

    def attach(self, engine: SSLTrainer) -> None:
        """Draw in the first process."""
        if is_main():
            engine.add_event_handler(Events.STARTED, self._start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
            engine.add_event_handler(Events.COMPLETED, self._close)
            engine.add_event_handler(Events.TERMINATE, self._close)
            engine.sinks.append(self._notice)

    def _start(self, engine: SSLTrainer) -> None:
        stream = self.stream or sys.stderr
        self._bar = tqdm(
            total=engine.total_steps,
            initial=engine.state.iteration,
            desc=self.description,
            unit="step",
            file=stream,
            mininterval=0.2 if stream.isatty() else 60.0,
            dynamic_ncols=stream.isatty(),
        )

    def _notice(self, step: int, epoch: int, figures: dict[str, float]) -> None:
        del step, epoch
        for name in ("knn", "images_per_s"):
            if name in figures:
                self._figures[name] = f"{figures[name]:.3g}"

    def _step(self, engine: SSLTrainer) -> None:
        if self._bar is None:
            return
        if engine.state.iteration % self.every_steps == 0 or engine.state.iteration == engine.total_steps:
            loss = f"{float(engine.state.output['loss']):.4f}"
            self._bar.set_postfix({"loss": loss, "epoch": engine.state.epoch, **self._figures}, refresh=False)
        self._bar.update(1)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
