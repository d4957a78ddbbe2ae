"""How many samples of a batch are worked on at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["change_some_", "chunks"]

# A CPU is fast as long as its caches hold what it works on: a tile of 224 px takes 0.6 MB a step. Whole batches run
# from main memory, and every step pays for fresh pages of the system. Fewer at a time, and calling PyTorch costs more.
_ON_CPU = 8


def chunks(batch: int, device: torch.device, on_cpu: int = _ON_CPU) -> Iterator[slice]:
    """Parts of a batch to be worked on one after the other: all of it at once, but on a CPU.

    Args:
        batch: number of samples.
        device: where they lie.
        on_cpu: samples at a time on a CPU.

    Yields:
        Slices that cover ``range(batch)``; nothing where it is empty.
    """
    step = on_cpu if device.type == "cpu" else max(batch, 1)
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def change_some_(images: Tensor, rows: slice, hit: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace some samples of a chunk, in place.

    Args:
        images: (B, C, H, W), written to.
        rows: the chunk.
        hit: (B,) bool on the CPU, the samples to replace.
        change: makes new samples of those that are hit, (n, C, H, W), and of their rows, (n,) int64 on the CPU.
    """
    at = hit[rows].nonzero().squeeze(1) + rows.start
    if len(at) == rows.stop - rows.start:
        images[rows] = change(images[rows], at)
    elif len(at):
        on_device = at.to(images.device)
        images.index_copy_(0, on_device, change(images.index_select(0, on_device), at))
