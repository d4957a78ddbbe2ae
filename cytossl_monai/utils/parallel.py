"""Work on many items in processes, where one item that fails or kills its process costs only itself."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from cytossl_monai.utils.errors import InputError, RunError, WorkerDiedError

__all__ = ["Outcome", "default_workers", "raise_failures", "run_parallel"]

Item = TypeVar("Item")
Result = TypeVar("Result")
logger = logging.getLogger(__name__)

_GRACE = 10.0
"""Seconds that a worker gets to end before it is killed."""


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What came of one item.

    Args:
        item: the item.
        result: what the function returned; None when it failed.
        error: what it raised, or a ``WorkerDiedError``; None when it did not.
    """

    item: Item
    result: Result | None = None
    error: Exception | None = None

    def unwrap(self) -> Result:
        """The result.

        Raises:
            Exception: the error, where there is one.
        """
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


def default_workers() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def raise_failures(failures: Sequence[Outcome[Any, Any]], n_items: int, what: str) -> None:
    """End a run of which items failed with one sentence: which items, and each reason once. Without failures, nothing.

    Args:
        failures: outcomes with an error; ``str(item)`` names the item.
        n_items: how many items there were.
        what: what the items are, in the plural.

    Raises:
        InputError: when the same input failed them all: that error.
        RunError: otherwise.
    """
    inputs = [f.error for f in failures if isinstance(f.error, InputError)]
    if inputs and len(inputs) == n_items:
        raise inputs[0]
    alike: dict[str, list[str]] = {}
    for failure in failures:
        alike.setdefault(str(failure.error), []).append(str(failure.item))
    if failures:
        reasons = "; ".join(f"{', '.join(same)}: {why}" for why, same in alike.items())
        count = f"{len(failures)} of {n_items} {what} failed"
        raise RunError(f"{count} ({reasons}); the others are kept, start again to do those alone")


def run_parallel(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int = 0,
    title: str = "",
    progress: bool = True,
    start_method: str | None = None,
) -> Iterator[Outcome[Item, Result]]:
    """Call ``function`` on every item and yield the outcomes as they come, in no fixed order.

    An exception is an outcome, never the end of the run. So is the death of a worker: its item is reported, a new
    worker takes its place, and the others go on. Each worker computes with one torch thread.

    Args:
        function: called with one item; picklable, as are the items and the results, when ``num_workers`` >= 1.
        items: what to work on.
        num_workers: number of processes; 0 works in this process (nothing then guards it against a crash).
        title: name of the progress bar.
        progress: show the progress bar.
        start_method: ``fork``, ``spawn`` or ``forkserver``. None takes ``fork`` where the system has it, but ``spawn``
            once CUDA is in use, which does not survive a fork.

    Yields:
        one ``Outcome`` an item.

    Raises:
        ValueError: when ``num_workers`` is negative.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers must be 0 or more, not {num_workers}")
    outcomes = (
        _run_here(function, items)
        if num_workers == 0 or not items
        else _run_processes(function, items, min(num_workers, len(items)), _context(start_method))
    )
    with tqdm(total=len(items), desc=title, disable=not progress, dynamic_ncols=True) as bar:
        for outcome in outcomes:
            bar.update()
            yield outcome


def _run_here(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Outcome[Item, Result]]:
    for item in items:
        try:
            outcome: Outcome[Item, Result] = Outcome(item, function(item))
        except Exception as error:  # noqa: BLE001 - every failure of an item is its outcome
            outcome = Outcome(item, error=error)
        yield outcome


def _context(start_method: str | None) -> BaseContext:
    if start_method is None:
        import torch

        forks = "fork" in multiprocessing.get_all_start_methods()
        start_method = "fork" if forks and not torch.cuda.is_initialized() else "spawn"
    return multiprocessing.get_context(start_method)


class _Worker:
    """One process, the pipe to it, and the item that it is at."""

    def __init__(self, context: BaseContext, function: Callable[[Any], Any], others: Sequence[_Worker]) -> None:
        self.pipe, far = context.Pipe()
        # A forked child inherits the pipes of its elder siblings and must close them, or their ends would never show.
        inherited = [self.pipe, *(w.pipe for w in others)] if context.get_start_method() == "fork" else []
        self.process: BaseProcess = context.Process(target=_serve, args=(far, function, inherited), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        far.close()
        self.at: int | None = None

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.terminate()
        self.process.join(_GRACE)
        if self.process.is_alive():  # native code that does not listen
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, function: Callable[[Any], Any], inherited: Sequence[Connection]) -> None:
    import torch

    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    # A parent that obeys SIGTERM in its own way (a training run that saves first) passes that way on through a fork.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return  # the parent is gone
        if message is None:
            return
        (item,) = message
        try:
            answer: tuple[Any, Exception | None] = (function(item), None)
        except Exception as error:  # noqa: BLE001 - every failure of an item is its outcome
            answer = (None, error)
        pipe.send_bytes(_portable(answer))


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers; none goes on for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(answer: tuple[Any, Exception | None]) -> bytes:
    """An answer as bytes that the other side can really read.

    An exception with a constructor of its own often pickles and does not unpickle: it goes as its name and its words.
    """
    try:
        message = pickle.dumps(answer)
        if answer[1] is not None:
            pickle.loads(message)
        return message
    except Exception as error:  # noqa: BLE001 - whatever its pickling raises
        failure = answer[1] if answer[1] is not None else error
        return pickle.dumps((None, RuntimeError(f"{type(failure).__name__}: {failure}")))


def _run_processes(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int, context: BaseContext
) -> Iterator[Outcome[Item, Result]]:
    waiting = deque(range(len(items)))
    workers: list[_Worker] = []
    try:
        while waiting or any(w.at is not None for w in workers):
            while waiting and len(workers) < num_workers:
                workers.append(_Worker(context, function, workers))
            for worker in workers:
                if worker.at is None and waiting:
                    worker.at = waiting.popleft()
                    try:
                        worker.pipe.send((items[worker.at],))
                    except (BrokenPipeError, ConnectionResetError):
                        logger.debug("worker %s is gone before its item", worker.process.pid)
            busy = {worker.pipe: worker for worker in workers if worker.at is not None}
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                item = items[worker.at]  # type: ignore[index]
                try:
                    message = worker.pipe.recv_bytes()
                except (EOFError, ConnectionResetError):
                    worker.stop()
                    workers.remove(worker)
                    yield Outcome(item, error=WorkerDiedError(_epitaph(worker.process.exitcode)))
                    continue
                worker.at = None
                try:
                    result, error = pickle.loads(message)
                except Exception as unreadable:  # noqa: BLE001 - a result that does not unpickle is its item's failure
                    result, error = None, RuntimeError(f"its result cannot be read: {unreadable}")
                yield Outcome(item, result, error)
    finally:
        for worker in workers:
            worker.stop()


def _epitaph(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = "; it may have run out of memory: use fewer workers" if name == "SIGKILL" else ""
        return f"the worker process was ended by {name}{hint}"
    return f"the worker process ended without an answer (exit status {exitcode})"
