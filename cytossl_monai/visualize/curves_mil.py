"""Pictures of a slide classifier's quality: ROC curves and confusion matrix."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cytossl_monai.metrics.calibration import reliability_bins
from cytossl_monai.metrics.classification import auc, confusion_matrix, one_vs_rest, roc_curve
from cytossl_monai.utils.files import atomic_path

__all__ = ["plot_confusion_matrix", "plot_few_shot", "plot_reliability", "plot_roc"]

_MAX_NAME = 40


def _shown(name: str) -> str:
    """A class name as matplotlib shows it: a dollar sign begins a formula there, a first underscore hides a label."""
    text = " ".join(str(name).split())
    text = text if len(text) <= _MAX_NAME else text[: _MAX_NAME - 3] + "..."
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def plot_roc(
    path: str | os.PathLike[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    target: str = "multiclass",
) -> Path | None:
    """Draw the ROC curve of every two-class question (see ``metrics.classification.one_vs_rest``) as PNG.

    Args:
        path: PNG file.
        labels: (n,) classes or (n, C) findings.
        probabilities: (n, C).
        classes: names of the C classes.
        target: kind of target.

    Returns:
        the path, or None when no question has both answers, so that there is no curve to draw.
    """
    questions = one_vs_rest(labels, probabilities, target)
    if target == "ordinal":
        names = [f"above {name}" for name in classes[:-1]]
    elif len(questions) == 1 and len(classes) == 2:
        names = [classes[1]]
    else:
        names = list(classes)
    drawable = [(name, y, s) for name, (y, s) in zip(names, questions) if 0 < np.sum(y) < len(y)]
    if not drawable:
        return None
    figure = Figure(figsize=(5, 5), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
    for name, y, scores in drawable:
        false, true, _ = roc_curve(y, scores)
        axes.plot(false, true, linewidth=1.8, label=f"{_shown(name)}: AUC {auc(y, scores):.3f}")
    axes.axvline(0.05, color="0.85", linewidth=1)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set_title(f"ROC, {len(labels)} slides")
    axes.legend(loc="lower right", frameon=False)
    return _save(figure, path)


def plot_reliability(
    path: str | os.PathLike[str], labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> Path:
    """Draw the reliability diagram as PNG: of each class the share of slides against the probability said.

    Points on the diagonal are what was promised; one above it was understated. Their areas grow with the slides.

    Args:
        path: PNG file.
        labels: (n,) classes or (n, C) findings.
        probabilities: (n, C).
        classes: names of the C classes; of two the second is drawn.
    """
    labels = np.asarray(labels)
    truth = labels if labels.ndim == 2 else np.eye(len(classes))[labels]
    figure = Figure(figsize=(5, 5), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
    for c in range(1 if labels.ndim == 1 and len(classes) == 2 else 0, len(classes)):
        points = reliability_bins(truth[:, c], probabilities[:, c])
        gap = float((probabilities[:, c] - truth[:, c]).mean())
        (line,) = axes.plot(points[:, 0], points[:, 1], linewidth=1.2, label=f"{_shown(classes[c])}: mean {gap:+.3f}")
        axes.scatter(points[:, 0], points[:, 1], s=10 + 200 * points[:, 2] / len(labels), color=line.get_color())
    axes.set(xlabel="probability", ylabel="share of slides", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set_title(f"Reliability, {len(labels)} slides")
    axes.legend(loc="upper left", frameon=False)
    return _save(figure, path)


def plot_confusion_matrix(
    path: str | os.PathLike[str], labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]
) -> Path:
    """Draw the confusion matrix as PNG; for multi-label (n, C) one two-by-two matrix a finding.

    Args:
        path: PNG file.
        labels: (n,) classes or (n, C) findings.
        predicted: decisions of the same shape.
        classes: names of the C classes.
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if labels.ndim == 2:
        parts = [
            (name, confusion_matrix(labels[:, c], predicted[:, c], 2), ["absent", "present"])
            for c, name in enumerate(classes)
        ]
    else:
        parts = [("", confusion_matrix(labels, predicted, len(classes)), list(classes))]
    side = 1.8 + 0.55 * len(parts[0][2])
    figure = Figure(figsize=((side + 0.6) * len(parts), side + 0.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, matrix, names) in enumerate(parts):
        title, names = _shown(title), [_shown(name) for name in names]
        axes = figure.add_subplot(1, len(parts), place + 1)
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(*matrix.shape):
            colour = "white" if share[row, column] > 0.6 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted", ylabel="true", title=title)
    return _save(figure, path)


def plot_few_shot(path: str | os.PathLike[str], curves: Mapping[str, pd.DataFrame]) -> Path:
    """Draw test AUC over the number of training slides a class, with the spread over the repeats, as PNG.

    Args:
        path: PNG file.
        curves: by name (of an encoder, say): columns ``shots, mean, low, high``.
    """
    figure = Figure(figsize=(5.5, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        (line,) = axes.plot(curve["shots"], curve["mean"], marker="o", label=_shown(name) or None)
        axes.fill_between(curve["shots"], curve["low"], curve["high"], alpha=0.2, color=line.get_color())
    ticks = sorted({int(k) for curve in curves.values() for k in curve["shots"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set(xlabel="training slides a class", ylabel="AUC on other patients", ylim=(0.0, 1.02))
    axes.axhline(0.5, color="0.7", linewidth=1, linestyle="--")
    if any(curves):
        axes.legend(frameon=False, loc="lower right")
    return _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png")
    return Path(path)
