"""Connected components of many planes at many levels at once, in PyTorch, on the device of the planes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

__all__ = ["LevelLabels", "among_neighbours", "label_levels", "label_planes"]

_ROUNDS = 3  # between two looks at whether all is linked: to look, the host waits; a round too many changes nothing

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
        mask: bool (B, H, W). On a CPU SciPy labels the stack in one call; elsewhere the runs of pixels of each row are
            linked to those that they touch.

    Returns:
        int32 (B, H, W), 0 outside, 1..n inside; and n.
    """
    if mask.device.type == "cpu":
        labels, count = ndimage.label(mask.numpy(), structure=_IN_PLANE)
        return torch.from_numpy(labels), int(count)
    return _label_by_runs(mask)


def _label_by_runs(mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``label_planes`` in tensor operations alone, for devices that SciPy cannot reach.

    Pixels are looked at twice: to find where in its row each run of them begins and ends, and to write the labels. In
    between there are only runs, a few for each row of a nucleus, which is little for a device.
    """
    batch, height, width = mask.shape
    # A column and a row of nothing part the rows and the planes, so that all of them make up one line.
    line = F.pad(mask, (1, 0, 0, 1)).flatten()
    bounds = (line[1:] ^ line[:-1]).nonzero().view(-1, 2)
    if len(bounds) == 0:
        return torch.zeros(mask.shape, dtype=torch.int32, device=mask.device), 0
    begin, end = bounds.T.contiguous()
    root = _first_connected(begin, end, width + 1)
    # Numbered as SciPy does, by the first run of each component, the one whose number is its own.
    number = (root == torch.arange(len(root), device=mask.device)).cumsum(0, dtype=torch.int32)
    step = number[root]
    # What a run adds where it begins it takes away where it ends; sums along the line are the labels.
    labels = torch.zeros(batch, height + 1, width + 1, dtype=torch.int32, device=mask.device)
    labels.view(-1).scatter_(0, bounds.flatten(), torch.stack([step, -step], 1).flatten())
    labels = labels.view(-1).cumsum(0, dtype=torch.int32).view_as(labels)
    return labels[:, :height, :width].contiguous(), int(number[-1])


def _first_connected(begin: torch.Tensor, end: torch.Tensor, pitch: int) -> torch.Tensor:
    """For every run of pixels the first run that it is connected with, by runs of neighbouring rows that overlap.

    Args:
        begin: (R,) int64, rising: position of the first pixel of each run.
        end: (R,) int64: position after its last one.
        pitch: from a pixel to the one below.

    Returns:
        (R,) int64 in [0, R).
    """
    own = torch.arange(len(begin), device=begin.device)
    # Of the runs that overlap below and above, the first and the last. Any between has this run alone for a neighbour
    # on its side, and finds it when it looks there itself.
    first = torch.searchsorted(end, torch.stack([begin + pitch, begin - pitch]), right=True)
    last = torch.searchsorted(begin, torch.stack([end + pitch, end - pitch])) - 1
    linked = torch.where(first <= last, torch.stack([first, last]), own)
    linked = torch.cat([linked.flatten(0, 1), own.unsqueeze(0)])
    root = own
    while True:
        theirs = root[linked]
        for _ in range(_ROUNDS):
            # Whatever a run and those it touches point at learns of the first; then all go where they are pointed to.
            lowest = theirs.amin(0).repeat(len(linked))
            learned = root.scatter_reduce(0, theirs.flatten(), lowest, "amin")
            for _ in range(2):
                learned = learned[learned]
            root = learned[root]
            theirs = root[linked]
        if torch.equal(theirs, root.expand_as(theirs)):
            return root


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
