"""How many samples of a batch are worked on at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cytossl_monai.transforms.kernels.device import to_device

__all__ = ["change_some_", "chunks", "per_sample", "share_memory"]

# A CPU is fast as long as its caches hold what it works on. Whole batches run from main memory, and every step pays for
# fresh pages of the system; of very few pixels at a time, calling PyTorch costs more than what it does.
_PIXELS_ON_CPU = 8 * 224 * 224


def chunks(images: Tensor, pixels: int = _PIXELS_ON_CPU) -> Iterator[slice]:
    """Parts of a batch to be worked on one after the other: on a CPU a few images, elsewhere all of them.

    Args:
        images: (B, ..., H, W).
        pixels: about so many at a time on a CPU, the channels not counted.

    Yields:
        Slices that cover ``range(B)``; nothing where it is empty.
    """
    batch, plane = len(images), images.shape[-2] * images.shape[-1]
    step = max(1, pixels // max(1, plane)) if images.device.type == "cpu" else max(1, batch)
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
        on_device = to_device(at, images.device)
        images.index_copy_(0, on_device, change(images.index_select(0, on_device), at))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), float32 on the device of ``like``."""
    return to_device(values.to(torch.float32), like.device).view(-1, 1, 1, 1)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether writing to one may change the other: what is read of it chunk by chunk must then be copied first."""
    return one is other or one.untyped_storage()._cdata == other.untyped_storage()._cdata
