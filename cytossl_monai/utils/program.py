"""How a program of this package ends: one line where something is wrong, whatever wrapped it."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import TracebackType

from cytossl_monai.utils.console import print_anything, write_above_bars
from cytossl_monai.utils.errors import TRACEBACK, InputError, RunError, TrainingDiverged, WorkerDiedError, causes
from cytossl_monai.utils.files import encodable

__all__ = ["EXIT_INTERRUPTED", "keep_logs_in", "plain_cause", "plain_errors", "sentence"]

logger = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C (128 + SIGINT, as shells give it)."""

_folder: Path | None = None
_before: object = None
_DEAD_LOADER = re.compile(r"DataLoader worker.*(exited unexpectedly|is killed by signal)", re.DOTALL)
_NO_MEMORY = re.compile(
    r"CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory|not enough memory|out of memory|Cannot allocate memory",
    re.IGNORECASE,
)
"""PyTorch has no error of its own for a processor's memory."""
_FROM_WORKER = "Original Traceback (most recent call last)"


def keep_logs_in(folder: str | os.PathLike[str]) -> None:
    """Write the traceback of an unexpected error into this folder; without, into the system's for temporary files."""
    global _folder
    _folder = Path(folder)


def sentence(error: BaseException) -> str | None:
    """One sentence for an error of a known kind, through whatever MONAI, Ignite or PyTorch wrapped it in.

    Known are this package's own errors, files that cannot be read or written, memory that ran out, and processes that
    read data and died.

    Returns:
        the sentence; None for what nobody expected.
    """
    own = _own_error(error)
    if own is not None:
        return _own_words(own)
    chain = causes(error)
    for inner in chain:
        if isinstance(inner, OSError) and (inner.filename is not None or inner.errno is not None):
            return f"{inner.strerror or inner}: {inner.filename or ''}".strip(": ")
        if isinstance(inner, MemoryError) or type(inner).__name__ == "OutOfMemoryError" or _ran_out(inner):
            return f"memory ran out ({_first_line(inner)}); lower batch_size, num_workers or tile_size and start again"
        if isinstance(inner, RuntimeError) and _DEAD_LOADER.search(str(inner)):
            return (
                f"a process that reads data ended ({_first_line(inner)}), as a rule because memory ran out; what was "
                "saved is kept: start the same command again, with a lower num_workers"
            )
    for inner in chain:
        if isinstance(inner, (ValueError, FileNotFoundError)) and _is_ours(inner):
            return _own_words(inner)
    return None


def plain_cause(error: Exception) -> BaseException:
    """The error that a user can act on behind what MONAI and Ignite wrapped it in, to be raised in its place.

    Returns:
        the package's own error in the chain; else a `RunError` with its sentence, or, for what nobody expected, with
        the kind and words of the first cause, whose traceback goes to the log.
    """
    own = _own_error(error)
    if own is not None:
        return own
    told = sentence(error)
    if told is None:
        logger.error("unexpected error", exc_info=error)
        first = causes(error)[-1]
        told = f"{type(first).__name__}: {_first_line(first)}; nobody expected this, the log has its traceback"
    return RunError(told)


def _own_error(error: BaseException) -> BaseException | None:
    """The outermost of this package's own kinds in the chain."""
    kinds = (InputError, RunError, TrainingDiverged, WorkerDiedError)
    return next((inner for inner in causes(error) if isinstance(inner, kinds)), None)


def _own_words(error: BaseException) -> str:
    """The message; of an error that a worker process of a ``DataLoader`` handed on, the last line of its traceback."""
    text = str(error).strip() or type(error).__name__
    if _FROM_WORKER in text:
        last = text.splitlines()[-1]
        return last.split(": ", 1)[1] if ": " in last else last
    return " ".join(text.split())


def _ran_out(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it itself: then its message was written for the user."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__", "")).startswith("cytossl_monai.")


def plain_errors() -> None:
    """End this program with one line where an error is not caught, in place of a traceback.

    For the first line of a script and the ``initialize`` of a bundle. A known kind becomes its sentence (exit status
    1); what nobody expected one line and the path of a file with the traceback (1); Ctrl-C one line (130).
    ``CYTOSSL_TRACEBACK=1`` shows the traceback as well. Called again, it looks after the log
    handlers that were set up since: those of a bundle's ``logging.conf``.
    """
    global _before
    print_anything()
    write_above_bars()
    for handler in logging.getLogger().handlers:
        handler.addFilter(_tells_something_new)
    if sys.excepthook is _hook:
        return
    _before = sys.excepthook
    sys.excepthook = _hook


def _tells_something_new(record: logging.LogRecord) -> bool:
    """Ignite logs an error that it raises again; the line at the end says it once."""
    return not (record.name.startswith("ignite") and "is terminating due to exception" in str(record.msg))


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    show = bool(os.environ.get(TRACEBACK))
    if show and callable(_before):
        _before(kind, error, trace)
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; what is finished is kept, start again to go on", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_INTERRUPTED)
    known = sentence(error)
    if known is not None:
        print(f"error: {known}", file=sys.stderr, flush=True)
    elif not show:
        inner = causes(error)[-1]
        where = _write_log(kind, error, trace)
        print(
            f"error: {type(inner).__name__}: {_first_line(inner)}; nobody expected this, its traceback is in {where}",
            file=sys.stderr,
            flush=True,
        )


def _write_log(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Path | str:
    text = "".join(traceback.format_exception(kind, error, trace))
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (_folder, Path(tempfile.gettempdir())):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            words = encodable(f"{' '.join(sys.argv)}\n\n{text}")
            (folder / name).write_text(words, encoding="utf-8")
        except OSError:
            continue
        return folder / name
    return f"no file, as none can be written; set {TRACEBACK}=1 to see it"
