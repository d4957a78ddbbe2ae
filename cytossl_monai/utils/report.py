"""What happened to each item of a run: done, already current, left out or failed, and why."""

from __future__ import annotations

import contextlib
import csv
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cytossl_monai.utils.cells import plain_cell
from cytossl_monai.utils.errors import failure
from cytossl_monai.utils.files import atomic_path, encodable

__all__ = ["EXIT_PARTIAL", "ItemProgress", "ItemStatus", "RunReport", "finish"]

EXIT_PARTIAL = 3
"""Exit status of a run that finished but left items out."""

Status = Literal["done", "current", "empty", "failed"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ItemStatus:
    """One line of the report.

    Args:
        item: what it is about, a slide_id as a rule.
        status: ``done`` now, ``current`` from an earlier run, ``empty`` (nothing usable found) or ``failed``.
        message: one sentence; for ``failed`` and ``empty`` it says what is wrong and what to do.
        seconds: time spent on it.
    """

    item: str
    status: Status
    message: str = ""
    seconds: float = 0.0


@dataclass
class ItemProgress:
    """What the work on an item says of it; see `RunReport.item`."""

    status: Status = "done"
    message: str = ""


@dataclass
class RunReport:
    """Collects one line per item, logs each as it comes, and writes them as CSV.

    Args:
        title: what the run does, for the summary line: "index", "embed".
        path: CSV file to write by ``save``; None keeps the report in memory.
    """

    title: str
    path: str | os.PathLike[str] | None = None
    items: list[ItemStatus] = field(default_factory=list)

    def add(self, item: str, status: Status, message: str = "", seconds: float = 0.0) -> None:
        """Add one line and log it; failures are logged as errors. What UTF-8 has not is written out (`encodable`)."""
        item, message = encodable(item), encodable(message)
        self.items.append(ItemStatus(item, status, message, seconds))
        level = logging.ERROR if status == "failed" else logging.WARNING if status == "empty" else logging.INFO
        logger.log(level, "%s %s: %s%s", self.title, item, status, f" - {message}" if message else "")

    @contextlib.contextmanager
    def item(self, item: str) -> Iterator[ItemProgress]:
        """Work on one item, so that its failure, whatever it is, costs only itself.

        Adds one line: ``done``, or what the body set ``status`` and ``message`` of the yielded object to, or ``failed``
        with the sentence of the error. A run that is asked to stop (`KeyboardInterrupt`, `SystemExit`) stops.

        Args:
            item: what it is about.

        Yields:
            the line to be, with ``status`` and ``message``.
        """
        line, start = ItemProgress(), time.perf_counter()
        try:
            yield line
        except Exception as error:  # noqa: BLE001 - every failure of an item is its own, whatever it is
            line.status, line.message = "failed", failure(error)
        self.add(item, line.status, line.message, time.perf_counter() - start)

    @property
    def left_out(self) -> list[ItemStatus]:
        """The items that later steps will not find."""
        return [item for item in self.items if item.status in ("failed", "empty")]

    @property
    def exit_code(self) -> int:
        """0 when every item is usable, 1 when none is, else ``EXIT_PARTIAL``."""
        if not self.left_out:
            return 0
        return 1 if len(self.left_out) == len(self.items) else EXIT_PARTIAL

    def summary(self) -> str:
        """One or more lines: the counts, then who was left out and why."""
        counts = Counter(item.status for item in self.items)
        counted = ", ".join(f"{counts[s]} {s}" for s in ("done", "current", "empty", "failed") if counts[s])
        lines = [f"{self.title}: {counted or 'nothing to do'}"]
        lines += [f"  {item.status} {item.item}: {item.message}" for item in self.left_out]
        return "\n".join(lines)

    def save(self) -> Path | None:
        """Write the report as CSV (``item,status,message,seconds``), atomically; returns its path."""
        if self.path is None:
            return None
        with atomic_path(self.path) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("item", "status", "message", "seconds"))
            writer.writerows(
                (plain_cell(i.item), i.status, plain_cell(i.message), f"{i.seconds:.2f}") for i in self.items
            )
        return Path(self.path)


def finish(report: RunReport) -> None:
    """Last step of a bundle's run: write the report, print its summary, exit with its status where items were left out.

    Raises:
        SystemExit: 3 when some items were left out, 1 when all were.
    """
    report.save()
    print(report.summary(), flush=True)
    if report.exit_code:
        raise SystemExit(report.exit_code)
