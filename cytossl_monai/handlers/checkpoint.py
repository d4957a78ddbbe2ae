"""Checkpoints during a run: the last few, and the best by a figure."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Events

from cytossl_monai.engines.ssl.checkpoint import find_checkpoints, save_checkpoint, step_of
from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.utils.distributed import barrier, is_main

__all__ = ["CheckpointHandler"]

logger = logging.getLogger(__name__)


class CheckpointHandler:
    """Saves the run every so often, keeps the newest files and the best one.

    Files are ``step_<8 digits>.pt`` and ``best.pt``. Each is written under another name and renamed when it is whole;
    an older one is deleted only after that. Resuming is the trainer's: give it the same folder as ``checkpoint_dir``.
    Attach it after the handlers that compute ``best_metric``. A checkpoint that is due by its step at the end of an
    epoch is written after the epoch's figures. What lies in the folder and is of another run is renamed to
    ``earlier_step_...``.

    Args:
        save_dir: the folder.
        every_epochs: epochs between two checkpoints; 0: none at the end of epochs.
        every_steps: steps between two checkpoints; 0: none within epochs.
        keep_last: how many of the newest are kept, at least 1.
        best_metric: figure that the trainer reports, of which the largest value is kept as ``best.pt``; None: no best.
            Steps count at which both the figure is computed and a checkpoint is due.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        every_epochs: int = 1,
        every_steps: int = 0,
        keep_last: int = 2,
        best_metric: str | None = "knn",
    ) -> None:
        if keep_last < 1 or every_epochs < 0 or every_steps < 0:
            raise ValueError("keep_last must be at least 1, every_epochs and every_steps not negative")
        self.save_dir = Path(save_dir)
        self.every_epochs, self.every_steps, self.keep_last = every_epochs, every_steps, keep_last
        self.best_metric = best_metric
        self.best: dict[str, float] = {}
        self._fresh: tuple[int, float] | None = None  # step and value
        self._begun: int | None = None  # step that the run went on from, until it saves for the first time

    def attach(self, engine: SSLTrainer) -> None:
        """Save at the chosen steps, at the ends of epochs and at the end of the run."""
        engine.stateful["checkpoint"] = self
        engine.sinks.append(self._notice)
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED, self.save)

    def _begin(self, engine: SSLTrainer) -> None:
        self._begun = engine.state.iteration

    def _step(self, engine: SSLTrainer) -> None:
        # At the end of an epoch its figures are still to come, which say whether this is the best.
        if self._due_by_step(engine) and engine.state.iteration % engine.state.epoch_length:
            self.save(engine)

    def _epoch(self, engine: SSLTrainer) -> None:
        if self._due_by_step(engine) or (self.every_epochs and engine.state.epoch % self.every_epochs == 0):
            self.save(engine)

    def _due_by_step(self, engine: SSLTrainer) -> bool:
        return self.every_steps > 0 and engine.state.iteration % self.every_steps == 0

    def _notice(self, step: int, epoch: int, figures: dict[str, float]) -> None:
        """Remember a new value of the figure that counts; a save at the same step decides on it."""
        del epoch
        if self.best_metric in figures:
            self._fresh = step, figures[self.best_metric]

    def save(self, engine: SSLTrainer) -> None:
        """Write a checkpoint of this step, unless there is one. Called in all processes; the first one writes."""
        step = engine.state.iteration
        path = self.save_dir / f"step_{step:08d}.pt"
        improved = False
        if self._fresh is not None and self._fresh[0] == step:  # a figure of other weights says nothing about these
            improved = self._fresh[1] > self.best.get("value", float("-inf"))
            if improved:
                self.best = {"value": self._fresh[1], "step": float(step)}
        self._fresh = None
        if engine.last_checkpoint == path or step == 0:
            if improved and path.exists():
                self._link_best(path)
            return
        engine.ensure_finite()
        self._put_aside()
        save_checkpoint(engine, path)
        barrier()
        engine.last_checkpoint = path
        if is_main():
            if improved:
                self._link_best(path)
            for old in find_checkpoints(self.save_dir)[self.keep_last :]:
                old.unlink(missing_ok=True)
            logger.info("Saved %s.", path)

    def _put_aside(self) -> None:
        """Before the first save: rename what another run left, one that this one did not go on from, or damaged files.

        Of later steps, they would count as the newest: this run's own would be deleted in their place, and the next
        start would go on from them.
        """
        begun, self._begun = self._begun, None
        if begun is None or not is_main():
            return
        foreign = [path for path in find_checkpoints(self.save_dir) if step_of(path) > begun]
        best = self.save_dir / "best.pt"
        for path in [*foreign, *([best] if begun == 0 and best.exists() else [])]:
            path.replace(path.with_name(f"earlier_{path.name}"))
            logger.warning("%s is not of this run: renamed to earlier_%s.", path, path.name)

    def _link_best(self, path: Path) -> None:
        """``best.pt`` is another name of the same file: no second copy on the disk."""
        partial = self.save_dir / ".best.partial.pt"
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:  # a file system without hard links
            partial.write_bytes(path.read_bytes())
        os.replace(partial, self.save_dir / "best.pt")

    def state_dict(self) -> dict[str, Any]:
        """The best figure so far and its step."""
        return {"best": dict(self.best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the best figure of the run that is resumed."""
        self.best = dict(state["best"])
