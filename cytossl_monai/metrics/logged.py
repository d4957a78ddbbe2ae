"""Figures of a run: single numbers of a step's output, and the log that they are kept in."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.metrics import Average
from torch import Tensor

from cytossl_monai.utils.errors import TableError, reason

__all__ = ["HEADER", "loss_metric", "read_log", "scalars"]


def scalars(output: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of a step's output, for ``output_transform`` of MONAI's handlers."""
    return {
        name: float(value)
        for name, value in output.items()
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def loss_metric() -> Average:
    """Mean loss of an epoch, as a key metric of the trainer."""
    return Average(output_transform=lambda output: float(output["loss"]))


HEADER = ("step", "epoch", "figure", "value")


def read_log(path: str | os.PathLike[str]) -> list[tuple[int, int, str, float]]:
    """The lines of a log; a last line that a killed run left half-written is dropped.

    Returns:
        (step, epoch, figure, value) tuples; none where there is no file.

    Raises:
        TableError: when a whole line is none that a run wrote.
    """
    path = Path(path)
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            text = stream.read()
        whole = text if text.endswith("\n") else text[: text.rfind("\n") + 1]
        rows = list(csv.reader(whole.splitlines()))[1:]
        return [(int(step), int(epoch), figure, float(value)) for step, epoch, figure, value in rows]
    except (ValueError, csv.Error) as error:
        raise TableError(
            f"{path} is no log of a run any more ({reason(error)}), as after a change by hand; move it away and start "
            "again: the run goes on with a new log"
        ) from error
