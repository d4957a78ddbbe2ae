"""One sentence instead of a traceback, where the user's input is what is wrong."""

from __future__ import annotations

import logging
import os
import sys
from types import TracebackType

from cytossl_monai.utils.errors import InputError
from cytossl_monai.utils.parallel import WorkerDiedError

__all__ = ["TRACEBACK", "failure", "input_error", "plain_errors"]

logger = logging.getLogger(__name__)

TRACEBACK = "CYTOSSL_TRACEBACK"
"""Environment variable; where it is set, tracebacks are shown all the same."""


def input_error(error: BaseException | None) -> InputError | None:
    """The `InputError` that led to an error, through what MONAI and Ignite wrapped it in; None where there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, InputError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def failure(error: Exception) -> str:
    """What a report says of an error: the sentence where the input is wrong, else the error's kind too, and a log."""
    if isinstance(error, (InputError, WorkerDiedError)):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}".strip(": ")
    logger.error("unexpected error", exc_info=error)
    return f"{type(error).__name__}: {error}; this is a fault of the program, the log has its traceback"


def plain_errors() -> None:
    """End this program with the sentence of an `InputError` that nobody caught, in place of a traceback.

    MONAI's configuration wraps an error several times; the sentence that helps would stand far above the last line. For
    the ``initialize`` of a bundle: it changes what an uncaught error prints, nothing else. The exit status stays 1.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause = None if os.environ.get(TRACEBACK) else input_error(error)
        if cause is None:
            before(kind, error, trace)
        else:
            print(f"error: {cause}\n(set {TRACEBACK}=1 to see where)", file=sys.stderr, flush=True)

    sys.excepthook = hook
