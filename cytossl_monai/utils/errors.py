"""Errors that a user can act on: one sentence that names the file, what is wrong and what to do."""

from __future__ import annotations

import logging

__all__ = [
    "EXIT_PREEMPTED",
    "TRACEBACK",
    "CheckpointError",
    "FeatureError",
    "InputError",
    "OutputError",
    "Preempted",
    "RunError",
    "SettingError",
    "ShardError",
    "SlideError",
    "TableError",
    "TrainingDiverged",
    "WorkerDiedError",
    "causes",
    "failure",
    "first_line",
    "reason",
]


class InputError(ValueError):
    """Something that the user gave is wrong. The message names it, says what is wrong and what to do."""


class SlideError(InputError):
    """A slide cannot be opened or read, or states no usable resolution."""


class TableError(InputError):
    """A slide table, datalist or tile index is malformed or contradicts itself."""


class FeatureError(InputError):
    """A feature file is missing, damaged, empty or made by another encoder."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or made for another architecture."""


class SettingError(InputError):
    """A setting of a configuration is unknown, of another kind, or out of range."""


class OutputError(InputError):
    """A result cannot be written: the disk is full, the folder is read-only, or something else lies there."""


class RunError(RuntimeError):
    """A part of a run failed. The message says which and why, and that the rest is kept."""


class ShardError(InputError):
    """A shard does not exist, or shards of different numbers meet in one folder, or some are missing."""


class WorkerDiedError(RuntimeError):
    """The process that worked on an item ended without an answer: killed, out of memory, or crashed in native code."""


EXIT_PREEMPTED = 75
"""Exit status after SIGTERM: saved, start again to go on (EX_TEMPFAIL of sysexits.h)."""


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite. The message says where, what is likely, and what to go on from."""


class Preempted(SystemExit):
    """The machine asked the run to leave; a checkpoint has been written. Exits with ``EXIT_PREEMPTED``."""

    def __init__(self, message: str = "") -> None:
        super().__init__(EXIT_PREEMPTED)
        self.message = message


logger = logging.getLogger(__name__)


TRACEBACK = "CYTOSSL_TRACEBACK"
"""Environment variable; where it is set, tracebacks are shown all the same."""


def causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, the first cause last."""
    chain: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in chain:
        chain.append(inner)
        inner = inner.__cause__ or (None if inner.__suppress_context__ else inner.__context__)
    return chain


def reason(error: BaseException) -> str:
    """What a library's error says, in one line of at most 160 characters, for the brackets of a sentence."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:160] or type(error).__name__


def first_line(error: BaseException, most: int = 120) -> str:
    """The first line of what a library's error says, at most so many characters; its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:most] if text else type(error).__name__


def failure(error: Exception) -> str:
    """What a report says of an error: the sentence where the input is wrong, else the error's kind too, and a log."""
    if isinstance(error, (InputError, WorkerDiedError)):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}".strip(": ")
    logger.error("unexpected error", exc_info=error)
    return f"{type(error).__name__}: {error}; this is a fault of the program, the log has its traceback"
