"""What a run says: headlines, progress, warnings and a summary on the terminal, all else in the run's ``run.log``."""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
from pathlib import Path

from tqdm import tqdm

__all__ = ["ConsoleHandler", "log_run", "print_anything", "write_above_bars"]

RUN_LOG = "run.log"


class ConsoleHandler(logging.StreamHandler):
    """Writes log lines above the progress bars that are shown, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:  # noqa: BLE001 - as every handler of the standard library: logging never ends a run
            self.handleError(record)


class _RunLog(logging.FileHandler):
    """Adds to the log of a run; where the file cannot be written, the run goes on without."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        rank = os.environ.get("RANK", "0")
        name = RUN_LOG if rank == "0" else f"run.{rank}.log"
        super().__init__(folder / name, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s  %(levelname)s  %(name)s  %(message)s"))


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


def print_anything() -> None:
    """Let ``print`` write out what the terminal's encoding has not, as standard error does, instead of ending the run.

    Such is a file name that is not UTF-8, or an accent where the terminal knows ASCII alone. A notebook's own output
    stays as it is.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def log_run(folder: str | os.PathLike[str]) -> Path | None:
    """From here on, what is no warning goes to ``run.log`` in this folder, and no longer to the terminal.

    The lines of MONAI and Ignite of every epoch are among it. Runs of one folder add to one file. A run within
    another's folder, such as a fold of a cross-validation, writes to the outer one's. Only a program that a bundle's
    ``logging.conf`` gave a terminal is changed; in an interpreter or a notebook, logging stays as its owner has it.

    Args:
        folder: the run's output folder.

    Returns:
        the file; None where nothing was changed.
    """
    root, folder = logging.getLogger(), Path(folder)
    consoles = [handler for handler in root.handlers if isinstance(handler, ConsoleHandler)]
    logs = [handler for handler in root.handlers if isinstance(handler, _RunLog)]
    if not consoles or any(folder.absolute().is_relative_to(log.folder) for log in logs):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = _RunLog(folder)
    except OSError:
        return None  # what writes to the folder says so
    for old in logs:
        root.removeHandler(old)
        old.close()
    root.addHandler(log)
    root.setLevel(min(root.level, logging.INFO))
    for console in consoles:
        console.setLevel(max(console.level, logging.WARNING))
    root.info("%s", shlex.join(sys.argv))
    return Path(log.baseFilename)
