"""Connected components of many planes at many levels at once, in PyTorch, on the device of the planes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

__all__ = ["LevelLabels", "among_neighbours", "label_levels", "label_planes"]

_ROUNDS = 4  # between two looks at whether anything changes: to look, the host waits; a round too many changes nothing

_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)


def among_neighbours(planes: torch.Tensor, pick: Callable[..., torch.Tensor]) -> torch.Tensor:
    """What ``pick`` (``torch.minimum`` or ``maximum``) takes of each pixel and its four neighbours in the plane.

    Args:
        planes: (B, H, W) of any dtype.
        pick: of two tensors, with ``out``.

    Returns:
        Like ``planes``; beyond the border there is nothing to take.
    """
    picked = planes.clone()
    for dim in (1, 2):
        kept = planes.shape[dim] - 1
        for here, there in ((1, 0), (0, 1)):
            part = picked.narrow(dim, here, kept)
            pick(part, planes.narrow(dim, there, kept), out=part)
    return picked


def label_planes(mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """4-connected components of every plane of a stack, numbered through the stack.

    Args:
        mask: bool (B, H, W). On a CPU SciPy labels the stack in one call; elsewhere labels spread between neighbours
            and along the pointers that they are, until nothing changes (about ten rounds for a tile).

    Returns:
        int32 (on a CPU) or int64 (B, H, W), 0 outside, 1..n inside; and n.
    """
    if mask.device.type == "cpu":
        labels, count = ndimage.label(mask.numpy(), structure=_IN_PLANE)
        return torch.from_numpy(labels), int(count)
    return _label_by_spreading(mask)


def _label_by_spreading(mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``label_planes`` in tensor operations alone, for devices that SciPy cannot reach."""
    if mask.numel() == 0:
        return torch.zeros(mask.shape, dtype=torch.int64, device=mask.device), 0
    pixels = torch.arange(1, mask.numel() + 1, device=mask.device).view(mask.shape)
    current = torch.where(mask, pixels, 0)
    while True:
        before = current
        for _ in range(_ROUNDS):
            spread = torch.where(mask, among_neighbours(current, torch.maximum), 0)
            # A label is the index of a pixel: what that pixel has learned in the meantime holds for this one as well.
            table = torch.cat([spread.new_zeros(1), spread.flatten()])
            current = table[table[spread]]
        if torch.equal(current, before):
            break
    # Numbered by the last pixel of each component, the one whose label is its own.
    number = (mask & (current == pixels)).flatten().cumsum(0)
    return torch.where(mask, number[(current - 1).clamp_min(0)], 0), int(number[-1])


@dataclass
class LevelLabels:
    """The components of every plane above every level.

    Attributes:
        rows: (R, W) int32 or int64, the labels of those rows that are not empty; empty ones part the others.
        place: (L, B * H) int64, where in ``rows`` each row of each level lies; meaningless for empty ones.
        first: L + 1 numbers: the components of level ``k`` are ``first[k] + 1`` to ``first[k + 1]``.
    """

    rows: torch.Tensor
    place: torch.Tensor
    first: list[int]

    def of(self, level: torch.Tensor | int, pixel: torch.Tensor) -> torch.Tensor:
        """Labels of pixels.

        Args:
            level: (P,) int64 or one for all.
            pixel: (P,) int64, positions in the flattened stack of planes; each must lie above its level.

        Returns:
            (P,) int64.
        """
        width = self.rows.shape[1]
        row = torch.div(pixel, width, rounding_mode="floor")
        return self.rows.flatten()[self.place[level, row] * width + pixel - row * width].long()


def label_levels(steps: torch.Tensor, levels: int) -> LevelLabels:
    """4-connected components of what lies above each level, in every plane, by one call for all of them.

    Most rows are empty, the more so the higher the level, and are left out.

    Args:
        steps: uint8 (B, H, W): how many levels a pixel lies above, at most ``levels``.
        levels: number of levels, at least 1 and less than 256.

    Returns:
        The labels, numbered through, level by level.
    """
    batch, height, width = steps.shape
    cuts = torch.arange(levels, dtype=torch.uint8, device=steps.device)
    filled = steps.amax(-1).view(1, -1) > cuts[:, None]
    begins = filled.clone()
    begins[:, 1:] &= ~filled[:, :-1]
    begins.view(levels, batch, height)[..., 0] = filled.view(levels, batch, height)[..., 0]
    place = (filled.flatten().long() + begins.flatten()).cumsum(0).sub_(1)
    at = filled.flatten().nonzero().squeeze(1)
    level = torch.div(at, batch * height, rounding_mode="floor")
    kept = steps.view(-1, width)[at - level * (batch * height)] > cuts[level, None]
    total = int(place[-1]) + 1
    mask = torch.zeros(total, width, dtype=torch.bool, device=steps.device)
    mask[place[at]] = kept
    rows = label_planes(mask[None])[0][0]
    last = torch.zeros(levels, dtype=rows.dtype, device=steps.device)
    last.scatter_reduce_(0, level, rows.amax(1)[place[at]], "amax")
    return LevelLabels(rows, place.view(levels, -1), [0, *last.cummax(0).values.tolist()])
