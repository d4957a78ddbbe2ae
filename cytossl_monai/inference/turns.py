"""Slides in turn: one run at a time has a slide, those of another run are come back to, copies are ready ahead."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.data.slides.cache import SlideCache
from cytossl_monai.utils.locks import LockedError, item_lock

__all__ = ["in_turn"]


def in_turn(
    records: Sequence[SlideRecord],
    folder: str | os.PathLike[str],
    doing: str,
    cache: SlideCache | None = None,
    needed: Callable[[SlideRecord], bool] | None = None,
) -> Iterator[SlideRecord]:
    """Yield each slide once, holding its lock in ``folder`` until the next one is asked for.

    A slide that another run is at comes at the end, when that run has done it.

    Args:
        records: the slides.
        folder: where their files are written.
        doing: what is done with them, for the lock.
        cache: copies them ahead; what is yielded then has ``local`` set.
        needed: for the cache, see `SlideCache.start`.
    """
    pending = deque((record, False) for record in records)
    with cache or contextlib.nullcontext():
        if cache is not None:
            cache.start(records, needed)
        while pending:
            record, wait = pending.popleft()
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(item_lock(folder, record.slide_id, doing, wait))
                except LockedError:
                    if cache is not None:
                        cache.release(record)  # its place is for slides that are done now
                    pending.append((record, True))
                    continue
                yield record if cache is None else stack.enter_context(cache.local(record))
