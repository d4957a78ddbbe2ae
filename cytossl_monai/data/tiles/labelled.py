"""Labelled images with folds, and their features: what probes look at."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cytossl_monai.data.tiles.images import ImageFolder, ImageRecord, image_size, list_images
from cytossl_monai.metrics.probe import group_folds
from cytossl_monai.utils.device_results import one_behind
from cytossl_monai.utils.errors import TableError

__all__ = ["LabelledImages", "embed_images", "training_mpp"]


@torch.no_grad()
def embed_images(encoder: nn.Module, dataset: Any, device: torch.device, batch_size: int = 64) -> Tensor:
    """(N, D) float32 features on the CPU, in evaluation mode; the encoder's modes are put back.

    Args:
        encoder: (B, 3, H, W) uint8 -> (B, D).
        dataset: gives many items at once by ``__getitems__``, with ``image``.
        device: where the encoder is.
        batch_size: images at a time.
    """
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()

    def encoded() -> Iterator[Tensor]:
        for start in range(0, len(dataset), batch_size):
            items = dataset.__getitems__(list(range(start, min(start + batch_size, len(dataset)))))
            yield encoder(torch.stack([item["image"] for item in items]).to(device))

    features = [torch.from_numpy(part) for part in one_behind(encoded())]
    for module, training in modes.items():
        module.training = training
    return torch.cat(features)


class LabelledImages:
    """Labelled images with folds, read once and kept as uint8: a square field around each marked place, or centre.

    Every field has the same width in um, so that a cell keeps its scale: were each image resized to the same side, the
    size of its box would be lost in one place and told by its blur in another.

    Args:
        source: folder of class folders, CSV or datalist; see ``list_images``.
        size: side in pixels of the images that it gives.
        mpp: micrometres per pixel of the files.
        view_mpp: micrometres per pixel of what it gives, so that a field is ``size * view_mpp`` um wide. None: as the
            files. An encoder is judged at the scale that it was trained on: see ``training_mpp``.
        n_folds: folds of the cross-validation.
        group_block: files are named by numbers, and so many neighbouring numbers stay in one fold (frames of a slide).
            None: the table's groups (patients); where it has none, and in a folder, all places of an image.
        limit: at most so many images, drawn evenly; None: all.
        least_filled: leave out images that fill less than this part of the field, which would be judged by their fill.
            1.0: those that are smaller than the field in either direction.
        fill: what stands beyond an image that is smaller than the field; see ``cut_field``.
        seed: of folds and limit.
        name: of the task, for tables.

    Attributes:
        labels: (N,) int64, numbers of ``classes``.
        classes: names of the classes, sorted.
        folds: (N,) int64.
        groups: N names of what stays in one fold.
        left_out: number of images left out by ``least_filled``.
        mpp: micrometres per pixel of the images.

    Raises:
        TableError: when images lack a label, there are fewer than two classes, too few of a class for the folds, or a
            name is no number with ``group_block``.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        size: int = 224,
        mpp: float = 0.25,
        view_mpp: float | None = None,
        n_folds: int = 5,
        group_block: int | None = None,
        limit: int | None = None,
        least_filled: float = 0.0,
        fill: Literal["reflect", "glass"] = "reflect",
        seed: int = 0,
        name: str = "",
    ) -> None:
        records = list_images(source)
        without = [str(record.path) for record in records if record.label is None]
        if without:
            raise TableError(f"{source}: {len(without)} images without a label, the first is {without[0]}; add labels")
        self.name, self.mpp = name or Path(source).stem, float(view_mpp or mpp)
        field = max(1, round(size * self.mpp / mpp))
        boxes = [_box(record) for record in records]
        kept = [i for i, box in enumerate(boxes) if _filled(box, field) >= least_filled]
        self.left_out = len(records) - len(kept)
        if limit is not None and limit < len(kept):
            kept = np.sort(np.random.default_rng(seed).choice(kept, limit, replace=False)).tolist()
        records, self._boxes = [records[i] for i in kept], [boxes[i] for i in kept]
        names = [str(record.label) for record in records]
        self.classes = sorted(set(names))
        if len(self.classes) < 2:
            one = self.classes[0] if self.classes else "no image is left"
            raise TableError(f"{source}: one class only ({one}); an evaluation needs at least two")
        self.labels = np.array([self.classes.index(name) for name in names])
        centred = [
            ImageRecord(record.path, record.label, record.group, box[2], box[3])
            for record, box in zip(records, self._boxes)
        ]
        self.dataset = ImageFolder(centred, size=size, mpp=mpp, crop=field, cache=True, fill=fill)
        self.groups = _groups(records, os.path.isdir(source), group_block, str(source))
        if len(set(self.groups)) < n_folds:
            raise TableError(
                f"{source}: {n_folds} folds need as many groups, got {len(set(self.groups))} ({self.groups[0]}, ...); "
                "give a column 'group' with more of them, or fewer folds"
            )
        self.folds = _folds(self.labels, self.groups, n_folds, seed, self.classes, str(source))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """(N, 3, size, size) uint8."""
        return torch.stack([item["image"] for item in self.dataset.__getitems__(range(len(self)))])

    def load(self) -> None:
        """Read all images now.

        Raises:
            InputError: names one that cannot be read, or a place that lies outside of its image.
        """
        for number in range(len(self)):
            self.dataset[number]

    def features(self, encoder: nn.Module, device: torch.device, batch_size: int = 64) -> Tensor:
        """(N, D) float32 features of all images."""
        return embed_images(encoder, self.dataset, device, batch_size)

    def box_features(self) -> np.ndarray:
        """(N, 2) logarithms of width and height of each image's file: what the size of a crop alone tells of its class.

        No encoder should be judged on a task that these solve; with places in frames they are all alike.
        """
        return np.log([[box[0], box[1]] for box in self._boxes]).astype(np.float32)


def training_mpp(dataset: Any, views: Any, mpp: float | None = None) -> float:
    """Micrometres per pixel at which an encoder is judged while it trains: those of its global views, in the middle.

    Args:
        dataset: what it is trained on; gives ``tile_um()``, the side of a tile.
        views: its ``ViewGenerator``: a global view shows ``global_scale`` of the tile's area on ``global_size`` pixels.
        mpp: another scale, which then holds.
    """
    if mpp is not None:
        return float(mpp)
    low, high = views.global_scale
    return float(dataset.tile_um()) * math.sqrt((low + high) / 2) / int(views.sizes[0])


def _box(record: ImageRecord) -> tuple[int, int, float, float]:
    """Width and height of the file, and the place that the field is cut around."""
    width, height = image_size(record.path)
    if record.x is None or record.y is None:
        return width, height, width / 2, height / 2
    return width, height, record.x, record.y


def _filled(box: tuple[int, int, float, float], field: int) -> float:
    """Part of the field that lies in the image."""
    width, height, x, y = box
    across = min(x + field / 2, width) - max(x - field / 2, 0)
    down = min(y + field / 2, height) - max(y - field / 2, 0)
    return max(across, 0) * max(down, 0) / field**2


def _folds(
    labels: np.ndarray, groups: Sequence[str], n_folds: int, seed: int, classes: Sequence[str], source: str
) -> np.ndarray:
    """Folds of which each leaves two classes to learn from: a probe would find out at the end of a training."""
    counts = np.bincount(labels)
    if counts.max() < n_folds:
        raise TableError(
            f"{source}: {n_folds} folds need a class with as many images, the largest has {counts.max()}; label more "
            "images, or take fewer folds"
        )
    folds = group_folds(labels.tolist(), groups, n_folds, seed)
    for fold in np.unique(folds):
        left = np.unique(labels[folds != fold])
        if len(left) < 2:
            raise TableError(
                f"{source}: without fold {fold} only the class {classes[left[0]]} is left to learn from; label more "
                "images of the other, in more than one group"
            )
    return folds


def _groups(records: Sequence[ImageRecord], folder: bool, block: int | None, source: str) -> list[str]:
    if block is not None:
        unnumbered = [record.path.name for record in records if not record.path.stem.isdigit()]
        if unnumbered:
            raise TableError(f"{source}: {unnumbered[0]} is not named by a number; leave group_block out")
        return [str(int(record.path.stem) // block) for record in records]
    # A class folder is the group that training draws by; folds may not be of it.
    return [str(record.path) if folder else record.group for record in records]
