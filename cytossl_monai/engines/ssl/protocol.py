"""What the parts of a pretraining run expect of one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["Stateful"]


class Stateful(Protocol):
    """A handler whose state belongs into a checkpoint: plain numbers, strings, lists, dictionaries, tensors."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up again."""
        ...
