"""What a run says on the terminal: one style, and no line that tears a progress bar."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

__all__ = ["ConsoleHandler"]


class ConsoleHandler(logging.Handler):
    """Writes log lines above the progress bars that are shown, on standard error.

    For the ``logging.conf`` of a bundle: ``class=cytossl_monai.utils.console.ConsoleHandler``.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # noqa: BLE001 - as every handler of the standard library: logging never ends a run
            self.handleError(record)
