"""The order in which tiles are trained on: weighted, shuffled across slides, and a pure function of (seed, step).

A run over thousands of slides can neither keep them all open nor jump to a random slide for every tile. So a pass is
shuffled in two stages: each slide's share of tiles is cut into short chunks, the chunks of all slides are shuffled, and
the tiles of ``window`` chunks at a time are mixed. A batch then comes from at most about ``2 * window`` slides, which a
worker reads in one batched call each, while over a pass every slide is met from beginning to end.

Nothing is kept between batches but the seed: the batch of any step is computed from its number, so that a resumed run
starts where the last one stopped without reading what it skips.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from torch.utils.data import Sampler

from cytossl_monai.utils.seeding import derive_seed

__all__ = ["SSLBatchSampler", "TileSource", "TileStream", "group_quotas", "windowed_order"]

logger = logging.getLogger(__name__)


@runtime_checkable
class TileSource(Protocol):
    """What a data set must say about itself to be sampled."""

    groups: np.ndarray
    """(n,) integers: the slide (or class folder) that each item belongs to."""

    weights: np.ndarray | None
    """(n,) float64 >= 0: how much each item is wanted within its group; None: all alike."""

    def __len__(self) -> int: ...


def group_quotas(sizes: np.ndarray, total: int, power: float) -> np.ndarray:
    """How many draws each group gets in a pass: proportional to ``sizes ** power``, summing to ``total`` exactly.

    Args:
        sizes: (g,) tiles of each group, >= 0.
        total: draws in a pass.
        power: 1 gives each tile the same share, 0 each slide; between them a huge slide counts for more, but less than
            its size.

    Returns:
        (g,) int64. Remainders go to the largest fractions; a group without tiles gets none.
    """
    shares = np.where(sizes > 0, np.power(np.maximum(sizes, 1).astype(np.float64), power), 0.0)
    exact = shares / shares.sum() * total
    quotas = np.floor(exact).astype(np.int64)
    missing = int(total - quotas.sum())
    if missing:
        quotas[np.argsort(-(exact - quotas), kind="stable")[:missing]] += 1
    return quotas


def windowed_order(chunks: Sequence[np.ndarray], window: int, rng: np.random.Generator) -> np.ndarray:
    """Shuffle chunks, then mix the elements of ``window`` chunks at a time.

    Args:
        chunks: arrays of item numbers, each from one group.
        window: chunks mixed together.
        rng: source of randomness.

    Returns:
        (sum of lengths,) all items, each as often as it occurs in ``chunks``.
    """
    shuffled = [chunks[i] for i in rng.permutation(len(chunks))]
    mixed = [rng.permutation(np.concatenate(shuffled[i : i + window])) for i in range(0, len(shuffled), window)]
    return np.concatenate(mixed) if mixed else np.empty(0, dtype=np.int64)


class TileStream:
    """The endless sequence of item numbers of one source, addressed by position.

    A pass has as many samples as the source has items. In each pass a slide gets its quota, and a tile of it as many
    samples as its weight says, to within one: with equal weights and ``group_power=1`` every tile exactly once.

    Args:
        source: the data set.
        seed: the order is a function of it.
        group_power: see ``group_quotas``.
        window: chunks, each of one slide, that are mixed together.
        chunk: tiles of a chunk.

    Raises:
        ValueError: when the source is empty, all weights are zero, or an argument is out of range.
    """

    def __init__(
        self,
        source: TileSource,
        seed: int = 0,
        group_power: float = 0.5,
        window: int = 16,
        chunk: int = 32,
    ) -> None:
        if len(source) == 0:
            raise ValueError("cannot sample from an empty data set")
        if window < 1 or chunk < 1:
            raise ValueError(f"window and chunk must be at least 1, got {window} and {chunk}")
        if group_power < 0:
            raise ValueError(f"group_power must not be negative, got {group_power}")
        groups = np.asarray(source.groups)
        weights = None if source.weights is None else np.asarray(source.weights, dtype=np.float64)
        if weights is not None and (not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0):
            raise ValueError("sampling weights must be finite and not negative, and one must be above zero")
        self.pass_length = len(source)
        self.seed, self.window, self.chunk = seed, window, chunk
        wanted = np.arange(len(groups)) if weights is None else np.flatnonzero(weights > 0)
        by_group = wanted[np.argsort(groups[wanted], kind="stable")]
        ends = np.flatnonzero(np.diff(groups[by_group])) + 1
        self._members: list[np.ndarray] = np.split(by_group, ends)
        self._weights = weights
        self._quotas = group_quotas(np.array([len(m) for m in self._members]), self.pass_length, group_power)
        self._cached: tuple[int, np.ndarray] | None = None

    def _draw(self, members: np.ndarray, quota: int, rng: np.random.Generator) -> np.ndarray:
        """``quota`` items of one group, each as often as its weight says to within one (systematic sampling)."""
        shuffled = rng.permutation(members)
        weights = np.ones(len(members)) if self._weights is None else self._weights[shuffled]
        ends = np.cumsum(weights) / weights.sum() * quota
        ends[-1] = quota
        return shuffled[np.searchsorted(ends, np.arange(quota) + rng.random(), side="right")]

    def order(self, pass_number: int) -> np.ndarray:
        """(pass_length,) int64: the items of one pass in order."""
        if self._cached is not None and self._cached[0] == pass_number:
            return self._cached[1]
        rng = np.random.default_rng(derive_seed(self.seed, pass_number))
        chunks: list[np.ndarray] = []
        for members, quota in zip(self._members, self._quotas):
            if quota:
                drawn = rng.permutation(self._draw(members, int(quota), rng))
                chunks += np.array_split(drawn, math.ceil(len(drawn) / self.chunk))
        result = windowed_order(chunks, self.window, rng)
        self._cached = (pass_number, result)
        return result

    def take(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64: the items at these positions of the endless sequence."""
        parts = []
        while start < stop:
            pass_number, offset = divmod(start, self.pass_length)
            part = self.order(pass_number)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


class SSLBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of ``(item, sample number)`` without end, from a given step on, for one process of several.

    The joined batch of a step is the processes' batches one after the other, in the order of their ranks: whoever runs
    it in one process sees the same samples. The *sample number* counts all samples of the run; whatever is random about
    a sample later (its views) may be derived from it.

    Args:
        dataset: a ``TileSource``, or one with ``sources`` (list of ``TileSource``), ``offsets`` and ``shares``, as
            ``MixedDataset`` has, whose sources are mixed by their shares in every batch.
        batch_size: samples a step for this process.
        seed: the whole sequence is a function of it.
        epoch_length: steps that count as an epoch (the length of the loader); default: as many as it takes to draw as
            many samples as the data set has items, at least one.
        group_power: how a slide's share grows with its number of tiles; see ``group_quotas``.
        window: slides (chunks of them) mixed at a time; bounds how many slides a batch needs open.
        chunk: tiles of a slide that stay together in a window.
        rank: this process.
        world_size: processes.

    Raises:
        ValueError: when an argument is out of range or the data set is empty.
    """

    def __init__(
        self,
        dataset: TileSource,
        batch_size: int,
        seed: int = 0,
        epoch_length: int | None = None,
        group_power: float = 0.5,
        window: int = 16,
        chunk: int = 32,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.global_batch_size = batch_size * world_size
        sources: Sequence[TileSource] = getattr(dataset, "sources", [dataset])
        self.offsets = np.asarray(getattr(dataset, "offsets", [0]), dtype=np.int64)
        shares = np.asarray(getattr(dataset, "shares", [1.0]), dtype=np.float64)
        self._bounds = np.concatenate([[0.0], np.cumsum(shares / shares.sum())])
        self._bounds[-1] = 1.0
        self._streams = [
            TileStream(source, derive_seed(seed, number), group_power, window, chunk)
            for number, source in enumerate(sources)
        ]
        if epoch_length is not None and epoch_length < 1:
            raise ValueError(f"epoch_length must be at least 1, got {epoch_length}")
        self.epoch_length = epoch_length or max(1, len(dataset) // self.global_batch_size)
        if self.global_batch_size > len(dataset):
            logger.warning(
                "a step takes %d samples and there are %d: a batch holds some of them twice, which methods that tell "
                "samples apart (SimCLR, MoCo v3) take for different ones; lower batch_size",
                self.global_batch_size,
                len(dataset),
            )
        self._first_batch: int | None = None
        self.start_step = 0

    def __len__(self) -> int:
        """Steps of an epoch; iterating does not stop there."""
        return self.epoch_length

    def set_start_step(self, step: int) -> None:
        """The next iterator begins with the batch of this step (counted from 0)."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        self.start_step = step

    def global_batch(self, step: int) -> np.ndarray:
        """(global_batch_size,) int64: the items of all processes at a step."""
        before = np.floor(self._bounds * (step * self.global_batch_size)).astype(np.int64)
        after = np.floor(self._bounds * ((step + 1) * self.global_batch_size)).astype(np.int64)
        # Samples so far of source i: floor(b[i+1] * n) - floor(b[i] * n), which sum to n whatever the shares are.
        first, last = np.diff(before), np.diff(after)
        items = [stream.take(int(first[i]), int(last[i])) + self.offsets[i] for i, stream in enumerate(self._streams)]
        rng = np.random.default_rng(derive_seed(self.seed, len(self._streams), step))
        return rng.permutation(np.concatenate(items))

    def batch(self, step: int) -> list[tuple[int, int]]:
        """This process' (item, sample number) pairs at a step."""
        first = self.rank * self.batch_size
        mine = self.global_batch(step)[first : first + self.batch_size]
        number = step * self.global_batch_size + first
        return [(int(item), number + slot) for slot, item in enumerate(mine)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while True:
            yield self.batch(step)
            step += 1

    def fingerprint(self) -> dict[str, int]:
        """What a checkpoint keeps to tell whether a resumed run sees the same sequence."""
        if self._first_batch is None:  # once: of millions of tiles the first pass takes seconds
            self._first_batch = derive_seed(*self.global_batch(0).tolist())
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "epoch_length": self.epoch_length,
            "first_batch": self._first_batch,
        }
