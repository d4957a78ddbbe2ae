"""What spares a GPU and its host: copies that need no answer, sums by group of a known size, numbers made once.

A GPU works behind the host, which waits where it reads a value, or where a result's size depends on values (boolean
indices, ``nonzero``, ``unique``, and ``torch.bincount``, which looks for the largest entry whatever it is told).
``tests/gpu_guards`` counts these waits and names each that is left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["grouped_sum", "grouped_sums", "made_once", "to_device"]

Made = TypeVar("Made", Tensor, tuple[Tensor, ...])

_KEPT = 8
_LARGEST = 4 * 2**20  # bytes; of tiles of 224 px the largest are 2 MB


def made_once(make: Callable[..., Made]) -> Callable[..., Made]:
    """Remember tensors that follow from sizes and a device alone: nobody may write to them.

    What a GPU would do in no time the host has to name again for every batch. The last few are remembered, but none
    that is large: those of a few whole images would fill the memory, and take longer to make than to name.
    """
    kept: dict[tuple[object, ...], Made] = {}

    @functools.wraps(make)
    def once(*args: object) -> Made:
        made = kept.get(args)
        if made is None:
            with torch.inference_mode(False):  # made for good: the next one who uses them may want gradients
                made = make(*args)
            parts = made if isinstance(made, tuple) else (made,)
            if sum(part.nbytes for part in parts) <= _LARGEST:
                kept[args] = made
            for oldest in list(kept)[:-_KEPT]:
                kept.pop(oldest, None)
        return made

    return once


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for what it is at.

    Args:
        values: of any shape and dtype. On the host they must not be pinned memory that is written to again.
        device: where to.

    Returns:
        ``values`` themselves where they are there already.
    """
    return values.to(device, non_blocking=values.device.type == "cpu")


def grouped_sum(group: Tensor, values: Tensor | None, count: int) -> Tensor:
    """Sums of values by group.

    Args:
        group: (P,) int64 in [0, count).
        values: (P,) float64; None counts.
        count: number of groups.

    Returns:
        (count,) float64 on the device of ``group``.
    """
    if group.device.type == "cpu":  # bincount of nothing forgets the type of its weights
        return torch.bincount(group, weights=values, minlength=count).double()
    total = torch.zeros(count, dtype=torch.float64, device=group.device)
    return total.index_add_(0, group, torch.ones_like(group, dtype=torch.float64) if values is None else values)


def grouped_sums(group: Tensor, values: Tensor, count: int) -> Tensor:
    """:func:`grouped_sum` of several values of each: values (K, P) float64, sums (K, count) float64."""
    if group.device.type == "cpu":
        return torch.stack([grouped_sum(group, one, count) for one in values])
    return torch.zeros(len(values), count, dtype=torch.float64, device=group.device).index_add_(1, group, values)
