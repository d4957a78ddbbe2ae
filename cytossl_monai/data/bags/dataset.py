"""Bags: one slide's tile features, as items of a MONAI dataset, batched with masks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import Randomizable

from cytossl_monai.data.bags.features import read_feature_attrs
from cytossl_monai.data.bags.items import Item
from cytossl_monai.data.bags.sampler import Drawn
from cytossl_monai.data.bags.transforms import LoadBagd
from cytossl_monai.utils.errors import FeatureError

__all__ = ["BagDataset", "collate_bags", "feature_statistics"]

logger = logging.getLogger(__name__)


class BagDataset(Dataset):
    """Slides as bags: a MONAI dataset that keeps the feature files it has read, within a bound.

    Args:
        data: items of ``bag_items``.
        transform: applied after loading; random ones draw anew every time, by the seed that a ``BagBatchSampler``
            gives a draw.
        encoder: ``hash`` and ``dim`` the features must have (``bag_encoder``); None takes any.
        cache_gb: keep loaded bags up to this many gigabytes; beyond it they are read again.
        choice: applied once after loading, before all else, whatever the bag is for: training, statistics or a test
            (`TilesPerSlided`). It gives the same tiles each time.
    """

    def __init__(
        self,
        data: Sequence[Item],
        transform: Callable[[Item], Any] | Sequence[Callable[[Item], Any]] | None = None,
        encoder: Mapping[str, Any] | None = None,
        cache_gb: float = 2.0,
        choice: Callable[[Item], Item] | None = None,
    ) -> None:
        super().__init__(data=list(data), transform=transform)
        self.load = LoadBagd(encoder=encoder)
        self.choice = choice
        self._left = int(cache_gb * 1e9)
        self._cache: dict[int, Item] = {}

    def whole(self, index: int) -> Item:
        """The bag of a slide, its choice of tiles, without any transform: ``features`` (N, D), ``coords`` (N, 2).

        Raises:
            FeatureError: when the file cannot be read, or is of another encoder.
        """
        item = self._cache.get(index)
        if item is None:
            item = self.load(self.data[index])
            if self.choice is not None:
                item = self.choice(item)
            size = item["features"].nbytes + item["coords"].nbytes
            if size <= self._left:
                self._left -= size
                self._cache[index] = item
        return dict(item)

    def _transform(self, index: int) -> Any:
        item = self.whole(index)
        if self.transform is None:
            return item
        if isinstance(index, Drawn) and isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed=index.seed % 2**32)
        return self.transform(item)

    def sizes(self) -> list[int]:
        """Number of tiles of every bag, before any transform."""
        return [int(read_feature_attrs(item["features"])["shape"][0]) for item in self.data]


def collate_bags(items: Sequence[Item]) -> dict[str, Any]:
    """Stack bags, padded to the largest of the batch.

    Args:
        items: dicts with ``features`` (n, D), ``coords`` (n, 2), ``slide_id`` and, where known, ``label``.

    Returns:
        ``features`` (B, N, D) float32, 0 on padding; ``mask`` (B, N) bool, True on tiles; ``coords`` (B, N, 2) int64,
        -1 on padding; ``label`` (B,) or (B, C) int64 when the items have one; lists ``slide_id``, ``patient_id``.

    Raises:
        FeatureError: when a bag is empty or the widths differ.
    """
    longest = max(len(item["features"]) for item in items)
    width = items[0]["features"].shape[1]
    features = torch.zeros(len(items), longest, width)
    coords = torch.full((len(items), longest, 2), -1, dtype=torch.int64)
    mask = torch.zeros(len(items), longest, dtype=torch.bool)
    for row, item in enumerate(items):
        n, d = item["features"].shape
        if n == 0:
            raise FeatureError(f"slide {item['slide_id']} is an empty bag: it has no tile; leave the slide out")
        if d != width:
            raise FeatureError(f"slide {item['slide_id']} has {d} features a tile, others have {width}")
        features[row, :n] = torch.as_tensor(item["features"], dtype=torch.float32)
        coords[row, :n] = torch.as_tensor(item["coords"], dtype=torch.int64)
        mask[row, :n] = True
    batch: dict[str, Any] = {
        "features": features,
        "mask": mask,
        "coords": coords,
        "slide_id": [item["slide_id"] for item in items],
        "patient_id": [item.get("patient_id", item["slide_id"]) for item in items],
    }
    if all("label" in item for item in items):
        batch["label"] = torch.as_tensor(np.array([item["label"] for item in items]), dtype=torch.int64)
    return batch


def feature_statistics(dataset: BagDataset, indices: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (D,) of the features, every slide counting alike however many tiles it has.

    Args:
        dataset: the training slides, without its transforms.
        indices: which of them; None takes all.
    """
    total = square = torch.zeros(0)
    chosen = range(len(dataset)) if indices is None else indices
    for count, index in enumerate(chosen):
        values = dataset.whole(index)["features"].double()
        mean, power = values.mean(dim=0), values.square().mean(dim=0)
        total, square = (mean, power) if count == 0 else (total + mean, square + power)
    mean = total / len(chosen)
    return mean.float(), (square / len(chosen) - mean.square()).clamp(min=0.0).sqrt().float()
