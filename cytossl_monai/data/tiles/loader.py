"""The loader that training reads from: decoding in workers, uint8 across the boundary."""

from __future__ import annotations

import os
import signal
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from cytossl_monai.data.tiles.dataset import collate_tiles
from cytossl_monai.data.tiles.sampler import SSLBatchSampler

__all__ = ["choose_workers", "tile_loader"]


def choose_workers(cpus: int | None = None, processes: int | None = None) -> int:
    """Worker processes for a machine: all cores but one a training process, at least one, at most 16.

    Args:
        cpus: cores; default: those this process may use.
        processes: training processes on this machine; default: what torchrun says, or 1.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, (cpus or available) // processes - 1))


def _one_thread(worker: int) -> None:
    """A worker decodes; threads of its own would compete with training.

    It ignores SIGTERM, which torchrun and batch systems send to a whole group of processes: workers that died first
    would take the training process with them before it has saved. PyTorch sets its own handler before this is called.
    A worker ends when its training process does, whichever way that ends: PyTorch's loader sees to it.
    """
    del worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def tile_loader(
    dataset: Any,
    sampler: SSLBatchSampler,
    num_workers: int | Literal["auto"] = "auto",
    prefetch: int = 4,
    pin_memory: bool | None = None,
    context: str | None = None,
) -> DataLoader:
    """A ``DataLoader`` over a data set of tiles or images.

    Args:
        dataset: gives many items at once by ``__getitems__``.
        sampler: says which, without end; its length is an epoch.
        num_workers: worker processes; ``"auto"``: see ``choose_workers``; 0 reads in the training process.
        prefetch: batches that each worker reads ahead.
        pin_memory: page-locked batches, which copy to a GPU without waiting; default: where there is CUDA.
        context: how workers start, ``"fork"`` or ``"spawn"``; default: the platform's.
    """
    workers = choose_workers() if num_workers == "auto" else int(num_workers)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        collate_fn=collate_tiles,
        worker_init_fn=_one_thread,
        multiprocessing_context=context if workers else None,
    )
