"""Labelled images with folds, and their features: what probes look at."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cytossl_monai.data.tiles.images import ImageFolder
from cytossl_monai.metrics.probe import group_folds
from cytossl_monai.utils.errors import TableError

__all__ = ["LabelledImages", "embed_images"]


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
    features = []
    for start in range(0, len(dataset), batch_size):
        items = dataset.__getitems__(list(range(start, min(start + batch_size, len(dataset)))))
        images = torch.stack([item["image"] for item in items]).to(device)
        features.append(encoder(images).float().cpu())
    for module, training in modes.items():
        module.training = training
    return torch.cat(features)


class LabelledImages:
    """Labelled images with folds, read once and kept as uint8.

    Args:
        source: folder of class folders, CSV or datalist; see ``list_images``.
        size: side in pixels that they are resized to.
        mpp: micrometres per pixel of the files.
        crop: what is cut out around x, y where the table has them, in pixels of the file.
        n_folds: folds of the cross-validation.
        by_group: keep groups of the table together in a fold (patients); for a folder of classes every image is its
            own group.
        limit: at most so many images, drawn evenly; None: all.
        seed: of folds and limit.

    Raises:
        TableError: when images lack a label, or there are fewer than two classes.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        size: int = 224,
        mpp: float = 0.25,
        crop: int = 128,
        n_folds: int = 5,
        by_group: bool | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        whole = ImageFolder(source, size=size, mpp=mpp, crop=crop)
        without = [str(r.path) for r in whole.records if r.label is None]
        if without:
            raise TableError(f"{source}: {len(without)} images without a label, the first is {without[0]}; add labels")
        records = whole.records
        if limit is not None and limit < len(records):
            chosen = np.random.default_rng(seed).choice(len(records), limit, replace=False)
            records = [records[i] for i in np.sort(chosen)]
        self.dataset = ImageFolder(records, size=size, mpp=mpp, crop=crop, cache=True)
        names = [str(record.label) for record in records]
        self.classes = sorted(set(names))
        if len(self.classes) < 2:
            raise TableError(f"{source}: one class only ({self.classes[0]}); an evaluation needs at least two")
        self.labels = np.array([self.classes.index(name) for name in names])
        grouped = not os.path.isdir(source) if by_group is None else by_group
        own_groups = len({r.group for r in records}) > max(n_folds, len(self.classes))
        groups = [r.group for r in records] if grouped and own_groups else None
        self.folds = group_folds(self.labels.tolist(), groups, n_folds, seed)

    def __len__(self) -> int:
        return len(self.labels)

    def features(self, encoder: nn.Module, device: torch.device, batch_size: int = 64) -> Tensor:
        """(N, D) float32 features of all images."""
        return embed_images(encoder, self.dataset, device, batch_size)
