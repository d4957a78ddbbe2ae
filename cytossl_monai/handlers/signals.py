"""Leaving in good order when the machine asks: save, then exit with a status of its own."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Sequence
from types import FrameType

import torch
import torch.distributed as dist
from ignite.engine import Events

from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.handlers.checkpoint import CheckpointHandler
from cytossl_monai.utils.distributed import world_size
from cytossl_monai.utils.errors import EXIT_PREEMPTED, Preempted

__all__ = ["PreemptionHandler"]

logger = logging.getLogger(__name__)


class PreemptionHandler:
    """On SIGTERM (preemptible machines) or SIGUSR1 (SLURM's warning) ends the current step, saves and exits with 75.

    With several processes, they agree every ``every_steps`` steps whether one of them was asked to leave, so that all
    save the same step. Ctrl-C ends the run at once. Python drops an interrupt that meets it while it tidies up memory:
    one that was dropped ends the run after the step.

    Args:
        checkpoint: the handler that saves; default: the one that is attached to the trainer before this one.
        signals: names of the signals to obey.
        every_steps: steps between two agreements among processes; a single process looks after every step.
    """

    def __init__(
        self,
        checkpoint: CheckpointHandler | None = None,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1"),
        every_steps: int = 5,
    ) -> None:
        self.checkpoint, self.every_steps = checkpoint, every_steps
        self.signals = [getattr(signal, name) for name in signals]
        self.asked = False
        self.interrupted = False
        self._before: dict[int, object] = {}

    def attach(self, engine: SSLTrainer) -> None:
        """Listen while the run lasts.

        Raises:
            ValueError: when there is no handler that saves.
        """
        if self.checkpoint is None:
            found = engine.stateful.get("checkpoint")
            if not isinstance(found, CheckpointHandler):
                raise ValueError("PreemptionHandler needs a CheckpointHandler before it among the handlers")
            self.checkpoint = found
        engine.add_event_handler(Events.STARTED, self._listen)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._look)

    def _listen(self, engine: SSLTrainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            logger.warning("Not in the main thread: signals are not obeyed, SIGTERM will end the run at once.")
            return
        engine.on_end.callback(self._restore)
        self._before = {number: signal.signal(number, self._on_signal) for number in self.signals}
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked = True

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.default_int_handler(number, frame)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _leaving(self, engine: SSLTrainer) -> bool:
        if world_size() == 1:
            return self.asked
        if engine.state.iteration % self.every_steps:
            return False
        flag = torch.tensor(int(self.asked), device=engine.state.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _look(self, engine: SSLTrainer) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        if not self._leaving(engine):
            return
        assert self.checkpoint is not None
        self.checkpoint.save(engine)
        self._restore()
        message = (
            f"Asked to leave: saved step {engine.state.iteration} of {engine.total_steps} as {engine.last_checkpoint}. "
            f"Exit status {EXIT_PREEMPTED}: start the same command again to go on."
        )
        logger.warning(message)
        raise Preempted(message)
