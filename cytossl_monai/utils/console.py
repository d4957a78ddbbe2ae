"""What a run says on the terminal: no log line tears a progress bar."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

__all__ = ["ConsoleHandler", "write_above_bars"]


class ConsoleHandler(logging.StreamHandler):
    """Writes log lines above the progress bars that are shown, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:  # noqa: BLE001 - as every handler of the standard library: logging never ends a run
            self.handleError(record)


def write_above_bars() -> None:
    """Let the root logger's lines on standard error appear above progress bars.

    MONAI takes no handlers but those of the standard library from a bundle's ``logging.conf``, so this puts ours in
    their place when a bundle starts.
    """
    root = logging.getLogger()
    for place, handler in enumerate(root.handlers):
        if type(handler) is logging.StreamHandler and handler.stream in (sys.stderr, sys.__stderr__):
            ours = ConsoleHandler(handler.stream)
            ours.setFormatter(handler.formatter)
            ours.setLevel(handler.level)
            root.handlers[place] = ours
