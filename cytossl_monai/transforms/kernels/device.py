"""What keeps the host from waiting for a GPU: copies to it that need no answer, and sums by group of a known size.

A GPU works behind the host, which waits where it reads a value, or where a result's size depends on values (boolean
indices, ``nonzero``, ``unique``, and ``torch.bincount``, which looks for the largest entry whatever it is told).
``tests/gpu_guards`` counts these waits and names each that is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["grouped_sum", "to_device"]


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
