"""Random masks over patches, drawn by the number of the sample and nothing else.

The mask of a sample is a function of (seed, number of the sample in the run, view). It therefore does not depend on the
device, on how a batch is split over processes or accumulation steps, or on whether the run was interrupted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cytossl_monai.utils.distributed import rank, world_size

__all__ = ["SampleCounter", "block_mask", "block_masks", "kept_patches", "sample_rng"]


class SampleCounter(nn.Module):
    """Numbers the samples of a run over all processes; its state is a buffer and resumes with the method's.

    Processes are to have batches of the same size.
    """

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._seen = 0  # the same on the host: reading the buffer would wait for the device at every step

    @torch.compiler.disable  # a number of Python that changes at every step: each would be compiled anew
    def take(self, batch: int) -> int:
        """Number of the first of ``batch`` local samples; while training, the count moves on by the joined batch."""
        first = self._seen + rank() * batch
        if self.training:
            self._seen += batch * world_size()
            self.seen.fill_(self._seen)
        return first

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen = int(self.seen)


def sample_rng(seed: int, sample: int, view: int) -> np.random.Generator:
    """Random numbers of one view of one sample: a counter-based generator (Philox), cheap to place anywhere."""
    return np.random.Generator(np.random.Philox(key=[seed, view], counter=[0, 0, 0, sample]))


def block_mask(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    hidden: int,
    smallest: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    attempts: int = 10,
) -> np.ndarray:
    """Hide about ``hidden`` patches in rectangles: a hole that cannot be filled from its next neighbour.

    Block-wise masking after Bao et al., "BEiT", ICLR 2022, algorithm 1, as iBOT uses it. Rectangles are added as long
    as they do not take the count over ``hidden``; it may stay a little below where none fits.

    Args:
        rng: source of the random numbers.
        rows: of the grid of patches.
        columns: of the grid of patches.
        hidden: number of patches to hide, at most.
        smallest: smallest area of a rectangle, in patches; None: ``(min(rows, columns) // 3) ** 2``, as iBOT has it
            (16 of a 14 x 14 grid; BEiT takes 4 of any).
        aspect: smallest and largest ratio of height to width, drawn on a logarithmic scale.
        attempts: rectangles tried before giving up.

    Returns:
        (rows, columns) bool, true where hidden.
    """
    least = (min(rows, columns) // 3) ** 2 if smallest is None else smallest
    mask = np.zeros((rows, columns), dtype=bool)
    count, failures = 0, 0
    while count < hidden and failures < attempts:
        room = hidden - count
        area = rng.uniform(*sorted((least, room)))  # iBOT's: above what is left, too, near the end
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        height, width = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if height > rows or width > columns:
            failures += 1
            continue
        top, left = rng.integers(0, rows - height + 1), rng.integers(0, columns - width + 1)
        block = mask[top : top + height, left : left + width]
        new = height * width - int(block.sum())
        if not 0 < new <= room:
            failures += 1
            continue
        block[:] = True
        count, failures = count + new, 0
    return mask


@torch.compiler.disable
def block_masks(
    first: int,
    batch: int,
    views: int,
    grid: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
    seed: int,
    device: torch.device,
) -> Tensor:
    """Block-wise masks of a batch.

    Args:
        first: number of the first sample, see :class:`SampleCounter`.
        batch: B.
        views: V, number of views.
        grid: rows and columns of patches.
        probability: share of views that are masked at all.
        ratio: smallest and largest share of patches hidden in a masked view, drawn evenly.
        seed: of the run.
        device: where the result goes.

    Returns:
        (V * B, rows * columns) bool, view by view, true where hidden.
    """
    rows, columns = grid
    masks = np.zeros((views, batch, rows, columns), dtype=bool)
    for view in range(views):
        for index in range(batch):
            rng = sample_rng(seed, first + index, view)
            if rng.random() < probability:
                hidden = int(rng.uniform(*ratio) * rows * columns)
                masks[view, index] = block_mask(rng, rows, columns, hidden)
    return torch.from_numpy(masks.reshape(views * batch, rows * columns)).to(device, non_blocking=True)


@torch.compiler.disable
def kept_patches(
    first: int,
    batch: int,
    views: int,
    patches: int,
    kept: int,
    seed: int,
    device: torch.device,
    hiding: Tensor | None = None,
) -> Tensor:
    """Choose, without replacement, the patches that stay visible.

    Args:
        first: number of the first sample, see :class:`SampleCounter`.
        batch: B.
        views: V.
        patches: N, number of patches of a view.
        kept: K, number that stay.
        seed: of the run.
        device: where the result goes.
        hiding: (V * B, N) float: a patch is drawn to stay with a weight of ``exp(-hiding)``; None is 0, all alike.

    Returns:
        (V * B, K) int64, ascending.
    """
    scores = np.empty((views * batch, patches))
    for view in range(views):
        for index in range(batch):
            # The K largest of (log weight + Gumbel noise) are a draw without replacement in proportion to the weights.
            scores[view * batch + index] = sample_rng(seed, first + index, view).gumbel(size=patches)
    noisy = torch.from_numpy(scores).to(device, non_blocking=True)
    if hiding is not None:
        noisy = noisy - hiding.to(noisy.dtype)
    return noisy.topk(kept, dim=1).indices.sort(dim=1).values
