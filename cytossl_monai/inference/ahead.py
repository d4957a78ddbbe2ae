"""Read the next items while this one is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from torch.utils.data import Dataset

__all__ = ["AheadLoader", "read_ahead"]

_AHEAD = 3
"""Batches that the reader may be ahead of the encoder: bounds the memory whatever the slide's size."""


def read_ahead(read: Callable[[int], Any], count: int, ahead: int = _AHEAD) -> Iterator[Any]:
    """Yield ``read(0) .. read(count - 1)`` in order; a thread calls ``read`` up to ``ahead`` items in advance.

    An error of ``read`` is raised here. Closing the iterator stops the thread.
    """
    results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=max(1, ahead))
    stop = threading.Event()

    def put(item: tuple[Any, BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        for i in range(count):
            try:
                item = (read(i), None)
            except BaseException as error:  # noqa: BLE001 - raised again by whoever iterates
                put((None, error))
                return
            if not put(item):
                return

    thread = threading.Thread(target=work, name="tile-reader", daemon=True)
    thread.start()
    try:
        for _ in range(count):
            result, error = results.get()
            if error is not None:
                raise error
            yield result
    finally:
        stop.set()
        thread.join()


class AheadLoader:
    """Items of a dataset in order; a thread prepares the next while the caller works on the present one.

    Args:
        dataset: a map-style dataset of slides.
        ahead: items prepared in advance.
    """

    def __init__(self, dataset: Dataset[Any], ahead: int = 1) -> None:
        self.dataset, self.ahead = dataset, ahead

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        with closing(read_ahead(self.dataset.__getitem__, len(self), self.ahead)) as items:  # type: ignore[type-var]
            yield from items
