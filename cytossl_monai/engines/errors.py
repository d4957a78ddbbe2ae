"""How a training run ends other than by finishing."""

from __future__ import annotations

__all__ = ["EXIT_PREEMPTED", "Preempted", "TrainingDiverged"]

EXIT_PREEMPTED = 75
"""Exit status after SIGTERM: saved, start again to go on (EX_TEMPFAIL of sysexits.h)."""


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite. The message says where, what is likely, and what to go on from."""


class Preempted(SystemExit):
    """The machine asked the run to leave; a checkpoint has been written. Exits with ``EXIT_PREEMPTED``."""

    def __init__(self, message: str = "") -> None:
        super().__init__(EXIT_PREEMPTED)
        self.message = message
