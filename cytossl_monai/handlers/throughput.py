"""How fast training runs, and how much of it is waiting for data."""

from __future__ import annotations

import logging
import time
from collections import deque

import torch
from ignite.engine import Events

from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.utils.distributed import world_size

__all__ = ["Throughput"]

logger = logging.getLogger(__name__)


class Throughput:
    """Reports images/s, the share of the time spent waiting for a batch, and the peak GPU memory.

    The times are the wall clock's between batches: on CUDA, where a step returns before the device is done, only the
    average over many steps means something. Time in other handlers (evaluation, checkpoints) is left out.

    Args:
        every_steps: steps between two reports; each is over the steps since the last.
        warmup_steps: first steps of a run that are not counted (workers start, kernels compile).
    """

    def __init__(self, every_steps: int = 10, warmup_steps: int = 3) -> None:
        self.every_steps, self.warmup_steps = max(1, every_steps), warmup_steps
        self._waits: deque[float] = deque()
        self._works: deque[float] = deque()
        self._asked = self._got = 0.0
        self._seen = self._images = 0
        self.total_wait = self.total_work = 0.0
        self.total_images = 0

    def attach(self, engine: SSLTrainer) -> None:
        """Time a trainer's steps."""
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._ask)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._get)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED, self._summary)

    @property
    def data_wait_share(self) -> float:
        """Share of the time of all counted steps that was spent waiting for data, in [0, 1]."""
        return self.total_wait / max(self.total_wait + self.total_work, 1e-12)

    def _ask(self) -> None:
        self._asked = time.perf_counter()

    def _get(self) -> None:
        self._got = time.perf_counter()

    def _step(self, engine: SSLTrainer) -> None:
        now = time.perf_counter()
        self._seen += 1
        if self._seen <= self.warmup_steps:
            return
        batch = engine.state.batch
        images = len(batch["image"] if isinstance(batch, dict) else batch[0]) * world_size()
        self._waits.append(self._got - self._asked)
        self._works.append(now - self._got)
        self._images += images
        if len(self._waits) >= self.every_steps:
            self._tell(engine)

    def _tell(self, engine: SSLTrainer) -> None:
        wait, work = sum(self._waits), sum(self._works)
        if wait + work == 0:
            return
        figures = {"images_per_s": self._images / (wait + work), "data_wait_share": wait / (wait + work)}
        if engine.state.device.type == "cuda":
            figures["gpu_memory_gib"] = torch.cuda.max_memory_allocated(engine.state.device) / 2**30
        self.total_wait, self.total_work = self.total_wait + wait, self.total_work + work
        self.total_images += self._images
        self._waits.clear()
        self._works.clear()
        self._images = 0
        engine.report(**figures)

    def _summary(self, engine: SSLTrainer) -> None:
        self._tell(engine)
        seconds = self.total_wait + self.total_work
        if seconds > 0:
            logger.info(
                "%.1f images/s; %.1f %% of the time was spent waiting for data.",
                self.total_images / seconds,
                100 * self.data_wait_share,
            )
            if self.data_wait_share > 0.1:
                logger.warning("Training waits for data: raise num_workers or prefetch, or read from a faster disk.")
