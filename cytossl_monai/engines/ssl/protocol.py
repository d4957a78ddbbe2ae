"""What the parts of a pretraining run expect of one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

__all__ = ["SSLRun", "Stateful"]


class Stateful(Protocol):
    """A handler whose state belongs into a checkpoint: plain numbers, strings, lists, dictionaries, tensors."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up again."""
        ...


class SSLRun(Protocol):
    """What a checkpoint holds of a run; the trainer is one.

    Attributes:
        method: the method that is trained.
        optimizer: its optimiser.
        scaler: the gradient scaler of float16; None otherwise.
        state: Ignite's state: step, epoch, metrics.
        total_steps: length of the run.
        stateful: handlers that are kept, by name.
    """

    method: nn.Module
    optimizer: Any
    scaler: Any
    state: Any
    total_steps: int
    stateful: dict[str, Stateful]

    def data_fingerprint(self) -> dict[str, int]:
        """What the order of the samples depends on."""
        ...
