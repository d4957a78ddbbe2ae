"""Batches of bags: of like size, classes drawn in balance where asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from cytossl_monai.utils.seeding import derive_seed

__all__ = ["BagBatchSampler", "Drawn"]


class Drawn(int):
    """The number of a bag, with the seed of this draw of it.

    The seed travels with the number to whichever process reads the bag: what is drawn from it differs from epoch to
    epoch, and does not depend on how many processes read.
    """

    seed: int

    def __new__(cls, number: int, seed: int) -> Drawn:
        """A number that is a ``Drawn``."""
        drawn = super().__new__(cls, number)
        drawn.seed = seed
        return drawn

    def __reduce__(self) -> tuple[Any, ...]:
        return Drawn, (int(self), self.seed)


class BagBatchSampler(Sampler[list[int]]):
    """Batches of bags of similar size, so that little is padded, drawn with the classes in balance.

    Bags are drawn for an epoch (all once; or, when balanced, n with replacement and equal chance for every class),
    sorted by size with some noise, cut into batches and the batches shuffled. A batch is cut early when padding it to
    its largest bag would exceed ``max_tiles``; one bag alone may exceed it.

    Args:
        sizes: (n,) tiles of every bag.
        batch_size: most bags in a batch.
        labels: (n,) classes or (n, C) findings, for ``balanced``.
        balanced: draw every class (every combination of findings) equally often.
        max_tiles: most tiles in a batch, padding included.
        shuffle: False: the bags in their order, once, for evaluation.
        seed: same seed, same batches; every epoch (``set_epoch``, or one more a pass) draws others.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int = 4,
        labels: Sequence[Any] | None = None,
        balanced: bool = False,
        max_tiles: int = 65536,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or max_tiles < 1:
            raise ValueError(f"batch_size and max_tiles must be at least 1, got {batch_size} and {max_tiles}")
        if balanced and labels is None:
            raise ValueError("balanced sampling needs labels")
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.batch_size, self.max_tiles, self.shuffle, self.seed = batch_size, max_tiles, shuffle, seed
        self.chance: np.ndarray | None = None
        if balanced:
            groups = np.asarray(labels).reshape(len(self.sizes), -1)
            _, group, counts = np.unique(groups, axis=0, return_inverse=True, return_counts=True)
            share = 1.0 / counts[group.reshape(-1)]
            self.chance = share / share.sum()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch's batches the next pass gives."""
        self.epoch = epoch

    def _batches(self, epoch: int) -> list[list[int]]:
        n = len(self.sizes)
        if not self.shuffle:
            return self._cut(np.arange(n))
        rng = np.random.default_rng([self.seed, epoch])
        if self.chance is not None:
            # Systematic draw: every class gets its share to within one bag, and rare bags repeat as seldom as they can.
            order = rng.permutation(n)
            drawn = order[np.searchsorted(np.cumsum(self.chance[order]), (np.arange(n) + rng.random()) / n)]
        else:
            drawn = np.arange(n)
        drawn = rng.permutation(drawn)
        noisy = self.sizes[drawn] * np.exp(0.25 * rng.standard_normal(n))
        batches = self._cut(drawn[np.argsort(noisy, kind="stable")])
        return [batches[i] for i in rng.permutation(len(batches))]

    def _cut(self, order: np.ndarray) -> list[list[int]]:
        batches: list[list[int]] = []
        batch: list[int] = []
        longest = 0
        for index in order.tolist():
            longest_then = max(longest, int(self.sizes[index]))
            if batch and (len(batch) == self.batch_size or longest_then * (len(batch) + 1) > self.max_tiles):
                batches.append(batch)
                batch, longest_then = [], int(self.sizes[index])
            batch.append(index)
            longest = longest_then
        if batch:
            batches.append(batch)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: a loader with workers makes two iterators and uses one, which is the one that counts an epoch.
        epoch, batches = self.epoch, self._batches(self.epoch)
        self.epoch += 1
        draws = itertools.count()
        for batch in batches:
            yield [Drawn(bag, derive_seed(self.seed, epoch, next(draws))) if self.shuffle else bag for bag in batch]

    def __len__(self) -> int:
        return len(self._batches(self.epoch))
