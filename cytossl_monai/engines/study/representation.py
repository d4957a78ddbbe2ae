"""What an encoder knows: the probes that its features are put to, and the table of encoders beside each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cytossl_monai.data.tiles.labelled import LabelledImages
from cytossl_monai.metrics.probe import FoldFigure, ProbeResult, fold_figure, knn_probe, linear_probe, paired_difference
from cytossl_monai.utils.device_results import one_behind

__all__ = [
    "FIGURES",
    "difference",
    "encode",
    "figures_of",
    "labelled_task",
    "probe",
    "representation_table",
]

FIGURES = {"knn": "kNN", "linear_probe": "linear probe", "linear_probe_auc": "macro AUC"}
"""Figures of a table: balanced accuracy of both probes, and the macro AUC of the linear one."""


def labelled_task(
    name: str,
    source: str | os.PathLike[str],
    size: int = 128,
    mpp: float = 0.25,
    field: int = 256,
    group_block: int | None = None,
    n_folds: int = 5,
    seed: int = 0,
    least_filled: float = 1.0,
    fill: Literal["reflect", "glass"] = "reflect",
) -> LabelledImages:
    """Read a task: a field of fixed width around each marked place, or around the centre of each image.

    Args:
        name: of the task.
        source: folder of class folders, CSV or datalist.
        size: side of the images in pixels.
        mpp: micrometres per pixel of the files.
        field: side of what is cut out, in pixels of the files. Choose one that most images fill.
        group_block: see ``LabelledImages``.
        n_folds: number of folds.
        seed: of the folds.
        least_filled: images that fill less of the field are left out; by default all that do not fill it.
        fill: see ``cut_field``.
    """
    return LabelledImages(
        source,
        size=size,
        mpp=mpp,
        view_mpp=mpp * field / size,
        n_folds=n_folds,
        group_block=group_block,
        least_filled=least_filled,
        fill=fill,
        seed=seed,
        name=name,
    )


@torch.inference_mode()
def encode(encoder: nn.Module, images: Tensor, device: torch.device | str = "cpu", batch_size: int = 64) -> np.ndarray:
    """(N, D) float32 features of (N, 3, H, W) uint8 images; leaves the encoder in evaluation mode, on the device."""
    encoder.to(device).eval()
    return np.concatenate(list(one_behind(encoder(part.to(device)) for part in images.split(batch_size))))


def probe(features: np.ndarray, task: LabelledImages) -> dict[str, ProbeResult]:
    """``knn`` and ``linear_probe`` over the task's folds; the probe's penalty is chosen by the task's groups.

    Args:
        features: (N, D), one row an image of the task.
        task: the labels, folds and groups.
    """
    return {
        "knn": knn_probe(features, task.labels, task.folds),
        "linear_probe": linear_probe(features, task.labels, task.folds, task.groups),
    }


def figures_of(probed: Mapping[str, ProbeResult]) -> dict[str, Any]:
    """Figures of a row: of each probe ``<name>`` and ``<name>_auc``, and ``_low``, ``_high``, ``_folds`` of both."""
    row: dict[str, Any] = {}
    for name, result in probed.items():
        for key, figure in ((name, result.balanced_accuracy), (f"{name}_auc", result.auc)):
            row |= {key: figure.mean, f"{key}_low": figure.low, f"{key}_high": figure.high}
            row[f"{key}_folds"] = list(figure.folds)
    return row


def difference(row: Mapping[str, Any], other: Mapping[str, Any], figure: str) -> FoldFigure:
    """A figure of one row less that of another of the same task, paired over the folds."""
    return paired_difference(fold_figure(row[f"{figure}_folds"]), fold_figure(other[f"{figure}_folds"]))


def representation_table(rows: Sequence[Mapping[str, Any]], reference: str | None = None) -> str:
    """Markdown: one line an encoder and task, each figure with its interval; then the differences to a named row.

    Args:
        rows: with ``task``, ``encoder`` and the figures of ``figures_of``.
        reference: encoder that the others are compared with; None: no differences.

    Raises:
        ValueError: when no row has the name of the reference.
    """
    names = list(FIGURES)
    lines = ["| task | encoder | " + " | ".join(FIGURES.values()) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = [f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})" for name in names]
        lines.append(f"| {row['task']} | {row['encoder']} | {' | '.join(cells)} |")
    if reference is None:
        return "\n".join(lines) + "\n"
    if not any(row["encoder"] == reference for row in rows):
        known = ", ".join(dict.fromkeys(row["encoder"] for row in rows))
        raise ValueError(f"no row is named {reference!r}; there are {known}")
    lines += ["", f"Less {reference}, paired over the folds:", ""]
    lines += ["| task | encoder | " + " | ".join(FIGURES.values()) + " |", "|---" * (len(names) + 2) + "|"]
    base = {row["task"]: row for row in rows if row["encoder"] == reference}
    for row in rows:
        if row["encoder"] == reference or row["task"] not in base:
            continue
        differences = [difference(row, base[row["task"]], name) for name in names]
        cells = [f"{figure.mean:+.3f} ({figure.low:+.3f} to {figure.high:+.3f})" for figure in differences]
        lines.append(f"| {row['task']} | {row['encoder']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
