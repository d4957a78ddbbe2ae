"""Bags: one slide's tile features, as items of a MONAI dataset, batched with masks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import MapTransform, Randomizable
from torch.utils.data import Sampler

from cytossl_monai.data.feature_store import read_feature_attrs, read_features
from cytossl_monai.data.slide_table import SlideRecord, encode_labels, read_slide_table
from cytossl_monai.utils.errors import FeatureError, TableError

__all__ = [
    "BagBatchSampler",
    "BagDataset",
    "LoadBagd",
    "RandTileDropoutd",
    "RandTileSampled",
    "bag_encoder",
    "bag_items",
    "collate_bags",
    "encode_targets",
    "feature_statistics",
]

logger = logging.getLogger(__name__)
Item = dict[str, Any]


def encode_targets(
    records: Sequence[SlideRecord], target: str = "multiclass", classes: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Labels as numbers.

    Args:
        records: slides with labels. ``multilabel``: findings joined by ``|`` or ``;`` ("candida|hsil"), or "none".
        target: "multiclass", "ordinal" or "multilabel".
        classes: the classes; None takes those that occur, sorted. ``ordinal`` needs them, lowest grade first.

    Returns:
        int64 (n,), or for ``multilabel`` (n, C) of 0 and 1; and the classes.

    Raises:
        TableError: when a slide has no label, one that is not among ``classes``, or all have the same.
        ValueError: when ``ordinal`` is asked for without ``classes``.
    """
    if target == "ordinal" and classes is None:
        raise ValueError("an ordinal target needs classes, lowest grade first: their order is not in the table")
    if target != "multilabel":
        labels, names = encode_labels(records, classes)
        if len(names) < 2:
            raise TableError(f"all slides have the label {names[0]!r}; a classifier needs at least two classes")
        return labels, names
    bare = [r.slide_id for r in records if r.label is None]
    if bare:
        raise TableError(f"slide {bare[0]} has no label; write 'none' where there is no finding")
    found = [
        [part.strip() for part in str(r.label).replace(";", "|").split("|") if part.strip() not in ("", "none")]
        for r in records
    ]
    names = [str(c) for c in classes] if classes is not None else sorted({name for row in found for name in row})
    if not names:
        raise TableError("no slide has a finding; a classifier needs some")
    number = {name: i for i, name in enumerate(names)}
    labels = np.zeros((len(records), len(names)), dtype=np.int64)
    for i, (record, row) in enumerate(zip(records, found)):
        for name in row:
            if name not in number:
                raise TableError(f"slide {record.slide_id} has the finding {name!r}, which is none of {names}")
            labels[i, number[name]] = 1
    return labels, names


def bag_items(
    slides: str | os.PathLike[str] | Sequence[SlideRecord],
    features_dir: str | os.PathLike[str],
    target: str = "multiclass",
    classes: Sequence[str] | None = None,
    labelled: bool = True,
) -> list[Item]:
    """One item a slide that has features: what ``BagDataset`` takes.

    Slides without a feature file (their slide could not be read, or was empty) are left out with a warning.

    Args:
        slides: slide table, or its records.
        features_dir: folder with ``<slide_id>.h5``.
        target: kind of label, see ``encode_targets``.
        classes: the classes, see ``encode_targets``.
        labelled: False: labels are not needed and not looked at.

    Returns:
        dicts of ``slide_id, patient_id, features`` (path of the file), ``fold``, ``split``, and with ``labelled`` also
        ``label`` (number, or array of 0 and 1 for ``multilabel``), ``label_name`` and ``classes``.

    Raises:
        TableError: see ``encode_targets``.
        FeatureError: when no slide has features.
    """
    records = read_slide_table(slides) if isinstance(slides, (str, os.PathLike)) else list(slides)
    folder = Path(features_dir)
    paths = {r.slide_id: folder / f"{r.slide_id}.h5" for r in records}
    missing = [r.slide_id for r in records if not paths[r.slide_id].is_file()]
    if len(missing) == len(records):
        raise FeatureError(f"none of the {len(records)} slides has a feature file in {folder}; embed the slides first")
    if missing:
        logger.warning("%d slides without features in %s are left out: %s", len(missing), folder, ", ".join(missing))
    records = [r for r in records if paths[r.slide_id].is_file()]
    items: list[Item] = [
        {
            "slide_id": r.slide_id,
            "patient_id": r.patient_id,
            "features": str(paths[r.slide_id]),
            "fold": r.fold,
            "split": r.extra.get("split") or None,
        }
        for r in records
    ]
    if labelled:
        labels, names = encode_targets(records, target, classes)
        for item, record, label in zip(items, records, labels):
            item.update(label=label if label.ndim else int(label), label_name=record.label, classes=names)
    return items


def bag_encoder(items: Sequence[Item]) -> dict[str, Any]:
    """The encoder that made the features of all items.

    Returns:
        ``hash`` (None when no file says), ``name`` and ``dim``.

    Raises:
        FeatureError: when two files come from different encoders or differ in width.
    """
    found: dict[str, Any] = {}
    first = ""
    for item in items:
        attrs = read_feature_attrs(item["features"])
        mine = {"hash": attrs.get("encoder"), "name": attrs.get("encoder_name"), "dim": int(attrs["shape"][1])}
        if not found:
            found, first = mine, item["features"]
        elif mine["dim"] != found["dim"] or mine["hash"] != found["hash"]:
            raise FeatureError(
                f"feature file {item['features']} was made by the encoder {mine['hash'] or '(unknown)'} "
                f"({mine['dim']} features), but {first} by {found['hash'] or '(unknown)'} ({found['dim']} features); "
                "embed all slides with one encoder"
            )
    if not found:
        raise FeatureError("no feature files to train on")
    return found


class LoadBagd(MapTransform):
    """Read a feature file: ``features`` becomes (N, D) float32, ``coords`` (N, 2) int64 is added.

    Args:
        keys: keys with paths of feature files.
        encoder: ``hash`` and ``dim`` that the features must have; None takes any.
        allow_missing_keys: see MONAI.
    """

    def __init__(
        self,
        keys: str | Sequence[str] = "features",
        encoder: Mapping[str, Any] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.encoder = dict(encoder or {})

    def __call__(self, data: Mapping[str, Any]) -> Item:
        """Item with paths -> item with tensors; raises FeatureError for unusable files."""
        item = dict(data)
        for key in self.key_iterator(item):
            path = item[key]
            bag = read_features(path)
            wanted_dim, wanted_hash = self.encoder.get("dim"), self.encoder.get("hash")
            if wanted_dim is not None and bag.features.shape[1] != wanted_dim:
                raise FeatureError(
                    f"feature file {path} has {bag.features.shape[1]} features a tile, {wanted_dim} are expected "
                    f"({self.encoder.get('name') or 'encoder of training'}); embed the slide with that encoder"
                )
            if wanted_hash is not None and bag.encoder is not None and bag.encoder != wanted_hash:
                raise FeatureError(
                    f"feature file {path} was made by the encoder {bag.encoder}, not by {wanted_hash}; embed the slide "
                    "with that encoder"
                )
            item[key] = torch.from_numpy(bag.features)
            item["coords"] = torch.from_numpy(bag.coords)
            item["feature_path"] = str(path)
        return item


class _RandTiles(Randomizable, MapTransform):
    """Base of the transforms that keep some tiles of a bag: the same ones of features and coordinates."""

    def __init__(self, keys: str | Sequence[str], allow_missing_keys: bool) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)

    def n_kept(self, n: int) -> int:
        """How many of n tiles to keep, at least one."""
        raise NotImplementedError

    def __call__(self, data: Mapping[str, Any]) -> Item:
        item = dict(data)
        n = len(item[self.keys[0]])
        kept = self.n_kept(n)
        if kept < n:
            places = torch.from_numpy(np.sort(self.R.choice(n, size=kept, replace=False)))
            for key in self.key_iterator(item):
                item[key] = item[key][places]
        return item


class RandTileDropoutd(_RandTiles):
    """Leave out a random share of the tiles: a regulariser for small cohorts.

    Args:
        max_share: the share left out is drawn from [0, max_share], in [0, 1); at least one tile stays.
        keys: what to take the tiles from.
        prob: how often to do it.
        allow_missing_keys: see MONAI.
    """

    def __init__(
        self,
        max_share: float = 0.5,
        keys: str | Sequence[str] = ("features", "coords"),
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0.0 <= max_share < 1.0:
            raise ValueError(f"max_share must be in [0, 1), got {max_share}")
        self.max_share, self.prob = max_share, prob

    def n_kept(self, n: int) -> int:
        """See the base."""
        if self.R.random() >= self.prob:
            return n
        return max(1, n - int(self.R.uniform(0.0, self.max_share) * n))


class RandTileSampled(_RandTiles):
    """Keep at most ``max_tiles`` tiles, drawn at random: bounds the memory that a huge slide takes in training.

    Args:
        max_tiles: the bound; None keeps all.
        keys: what to take the tiles from.
        allow_missing_keys: see MONAI.
    """

    def __init__(
        self,
        max_tiles: int | None = 8192,
        keys: str | Sequence[str] = ("features", "coords"),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if max_tiles is not None and max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, got {max_tiles}")
        self.max_tiles = max_tiles

    def n_kept(self, n: int) -> int:
        """See the base."""
        return n if self.max_tiles is None else min(n, self.max_tiles)


class BagDataset(Dataset):
    """Slides as bags: a MONAI dataset that keeps the feature files it has read, within a bound.

    Args:
        data: items of ``bag_items``.
        transform: applied after loading; random ones draw anew every time.
        encoder: ``hash`` and ``dim`` the features must have (``bag_encoder``); None takes any.
        cache_gb: keep loaded bags up to this many gigabytes; beyond it they are read again.
    """

    def __init__(
        self,
        data: Sequence[Item],
        transform: Callable[[Item], Any] | Sequence[Callable[[Item], Any]] | None = None,
        encoder: Mapping[str, Any] | None = None,
        cache_gb: float = 2.0,
    ) -> None:
        super().__init__(data=list(data), transform=transform)
        self.load = LoadBagd(encoder=encoder)
        self._left = int(cache_gb * 1e9)
        self._cache: dict[int, Item] = {}

    def _transform(self, index: int) -> Any:
        item = self._cache.get(index)
        if item is None:
            item = self.load(self.data[index])
            size = item["features"].nbytes + item["coords"].nbytes
            if size <= self._left:
                self._left -= size
                self._cache[index] = item
        return self.transform(dict(item)) if self.transform is not None else dict(item)

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
        batches = self._batches(self.epoch)
        self.epoch += 1
        return iter(batches)

    def __len__(self) -> int:
        return len(self._batches(self.epoch))


def feature_statistics(dataset: BagDataset, indices: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (D,) of the features, every slide counting alike however many tiles it has.

    Args:
        dataset: the training slides; its random transforms are not applied.
        indices: which of them; None takes all.
    """
    total = square = torch.zeros(0)
    chosen = range(len(dataset)) if indices is None else indices
    transform, dataset.transform = dataset.transform, None
    try:
        for count, index in enumerate(chosen):
            values = dataset[index]["features"].double()
            mean, power = values.mean(dim=0), values.square().mean(dim=0)
            total, square = (mean, power) if count == 0 else (total + mean, square + power)
    finally:
        dataset.transform = transform
    mean = total / len(chosen)
    return mean.float(), (square / len(chosen) - mean.square()).clamp(min=0.0).sqrt().float()
