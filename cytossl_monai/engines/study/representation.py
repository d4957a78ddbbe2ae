"""What an encoder knows: labelled images, read once, and the probes that its features are put to."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cytossl_monai.data.tiles.images import ImageFolder, ImageRecord, list_images
from cytossl_monai.metrics.probe import ProbeResult, group_folds, knn_probe, linear_probe
from cytossl_monai.utils.errors import TableError

__all__ = ["PROBES", "LabelledTask", "encode", "labelled_task", "probe"]

PROBES = {"knn": knn_probe, "linear_probe": linear_probe}


@dataclass(frozen=True)
class LabelledTask:
    """Labelled images and the folds that they are cross-validated by.

    Args:
        name: of the task.
        images: (N, 3, size, size) uint8.
        labels: (N,) int64, numbers of ``classes``.
        folds: (N,) int64.
        classes: names of the classes, sorted.
        mpp: micrometres per pixel of ``images``.
    """

    name: str
    images: Tensor
    labels: np.ndarray
    folds: np.ndarray
    classes: tuple[str, ...]
    mpp: float


def labelled_task(
    name: str,
    source: str | os.PathLike[str],
    size: int = 128,
    mpp: float = 0.25,
    field: int = 256,
    group_block: int | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> LabelledTask:
    """Read a task: a field of fixed width around each marked place, or around the centre of each image.

    A cell keeps its scale so, other than if every crop were resized to the same side.

    Args:
        name: of the task.
        source: folder of class folders, CSV or datalist; see ``list_images``.
        size: side of the images in pixels.
        mpp: micrometres per pixel of the files.
        field: side of what is cut out, in pixels of the files.
        group_block: files are named by numbers, and so many neighbouring numbers stay in one fold (frames of a slide);
            None: every image is its own group.
        n_folds: number of folds.
        seed: of the folds.

    Raises:
        TableError: when an image has no label, there is one class only, or a name is no number with ``group_block``.
    """
    records = []
    for record in list_images(source):
        if record.label is None:
            raise TableError(f"{source}: {record.path} has no label; put images into class folders or add a column")
        if record.x is None or record.y is None:
            with Image.open(record.path) as image:
                x, y = image.width / 2, image.height / 2
            record = ImageRecord(record.path, record.label, record.group, x, y)
        records.append(record)
    classes, labels = np.unique([record.label or "" for record in records], return_inverse=True)
    if len(classes) < 2:
        raise TableError(f"{source}: one class only ({classes[0]}); a probe needs at least two")
    groups = None
    if group_block is not None:
        unnumbered = [record.path.name for record in records if not record.path.stem.isdigit()]
        if unnumbered:
            raise TableError(f"{source}: {unnumbered[0]} is not named by a number; leave group_block out")
        groups = [int(record.path.stem) // group_block for record in records]
    dataset = ImageFolder(records, size=size, mpp=mpp, crop=field)
    images = torch.stack([item["image"] for item in dataset.__getitems__(range(len(dataset)))])
    folds = group_folds(labels.tolist(), groups, n_folds, seed)
    return LabelledTask(name, images, labels, folds, tuple(classes.tolist()), mpp * field / size)


@torch.inference_mode()
def encode(encoder: nn.Module, images: Tensor, device: torch.device | str = "cpu", batch_size: int = 64) -> np.ndarray:
    """(N, D) float32 features of (N, 3, H, W) uint8 images; leaves the encoder in evaluation mode, on the device."""
    encoder.to(device).eval()
    parts = [encoder(part.to(device)).float().cpu() for part in images.split(batch_size)]
    return torch.cat(parts).numpy()


def probe(features: np.ndarray, task: LabelledTask) -> dict[str, ProbeResult]:
    """Balanced accuracy of each of ``PROBES`` over the task's folds, with 95 % intervals.

    Args:
        features: (N, D), one row an image of the task.
        task: the labels and folds.
    """
    return {name: function(features, task.labels, task.folds) for name, function in PROBES.items()}
