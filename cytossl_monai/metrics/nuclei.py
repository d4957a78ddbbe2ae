"""How well nuclei are found: pixel Dice, object F1 at an overlap, and recall and coverage for marked points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from skimage.measure import label

__all__ = ["ObjectScore", "label_overlaps", "mask_dice", "object_f1", "point_recall"]


@dataclass(frozen=True)
class ObjectScore:
    """Counts of a one-to-one matching of found against true objects.

    Args:
        true_positives: true objects matched by a found one.
        false_positives: found objects left over.
        false_negatives: true objects left over.
    """

    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def precision(self) -> float:
        """Share of the found objects that are true; 1 where none was found."""
        found = self.true_positives + self.false_positives
        return self.true_positives / found if found else 1.0

    @property
    def recall(self) -> float:
        """Share of the true objects that were found; 1 where there are none."""
        true = self.true_positives + self.false_negatives
        return self.true_positives / true if true else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 where nothing is there and nothing was found."""
        denominator = 2 * self.true_positives + self.false_positives + self.false_negatives
        return 2 * self.true_positives / denominator if denominator else 1.0

    def __add__(self, other: ObjectScore) -> ObjectScore:
        return ObjectScore(
            self.true_positives + other.true_positives,
            self.false_positives + other.false_positives,
            self.false_negatives + other.false_negatives,
        )


def _same_shape(found: NDArray[Any], truth: NDArray[Any]) -> None:
    if found.shape != truth.shape:
        raise ValueError(f"found has shape {found.shape} and truth {truth.shape}; they must show the same field.")


def mask_dice(found: ArrayLike, truth: ArrayLike) -> float:
    """Dice coefficient of two masks in [0, 1]; 1 where both are empty.

    Args:
        found: mask of any shape, non-zero is nucleus.
        truth: mask of the same shape.

    Raises:
        ValueError: shapes differ.
    """
    a, b = np.asarray(found) != 0, np.asarray(truth) != 0
    _same_shape(a, b)
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else 1.0


def _as_labels(image: ArrayLike) -> NDArray[np.int64]:
    """Instance labels 1..n without gaps; a boolean mask is cut into its 8-connected components."""
    array = np.asarray(image)
    if array.dtype == bool:
        return np.asarray(label(array, connectivity=2), dtype=np.int64)
    values, inverse = np.unique(array, return_inverse=True)
    if values.size and values[0] < 0:
        raise ValueError(f"Instance labels must not be negative, got {values[0]}.")
    return inverse.reshape(array.shape) + (0 if values.size and values[0] == 0 else 1)


def label_overlaps(found: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of every found with every true object.

    Args:
        found: (H, W) instance labels, 0 is background, or a boolean mask.
        truth: the same for the true objects.

    Returns:
        float64 (n_found, n_true).

    Raises:
        ValueError: shapes differ, or a label is negative.
    """
    a, b = _as_labels(found), _as_labels(truth)
    _same_shape(a, b)
    n, m = int(a.max(initial=0)), int(b.max(initial=0))
    joint = np.bincount((a * (m + 1) + b).ravel(), minlength=(n + 1) * (m + 1)).reshape(n + 1, m + 1)
    union = joint.sum(1)[1:, None] + joint.sum(0)[None, 1:] - joint[1:, 1:]
    return joint[1:, 1:] / np.maximum(union, 1)


def object_f1(found: ArrayLike, truth: ArrayLike, min_iou: float = 0.5) -> ObjectScore:
    """Match found and true objects one to one where their intersection over union is above ``min_iou``.

    Args:
        found: (H, W) instance labels or a boolean mask (its components are the objects).
        truth: the same for the truth.
        min_iou: in [0, 1). From 0.5 on each object has at most one partner; below it the matching with the most pairs,
            and among those the largest sum of overlaps, counts.

    Raises:
        ValueError: ``min_iou`` out of range, shapes differ, or a label is negative.
    """
    if not 0.0 <= min_iou < 1.0:
        raise ValueError(f"min_iou is {min_iou}; it must lie in [0, 1).")
    overlaps = label_overlaps(found, truth)
    n, m = overlaps.shape
    allowed = overlaps > min_iou
    # A pair counts more than any gain in overlap, so the assignment maximises pairs first.
    rows, columns = linear_sum_assignment(np.where(allowed, overlaps + 2.0 * min(n, m) + 2.0, 0.0), maximize=True)
    matched = int(allowed[rows, columns].sum())
    return ObjectScore(matched, n - matched, m - matched)


def point_recall(centroids: ArrayLike, points: ArrayLike, radius: float, labels: ArrayLike | None = None) -> float:
    """Share of marked points with a found nucleus within ``radius``.

    Args:
        centroids: (N, 2) x, y of the found nuclei in pixels.
        points: (M, 2) x, y of the marks in pixels.
        radius: largest distance in pixels.
        labels: (H, W) instance map of the found nuclei. When given, a mark also counts where the nearest nuclear
            *pixel*, not only the centroid, lies within ``radius``.

    Returns:
        recall in [0, 1]; 1 where there are no marks.

    Raises:
        ValueError: ``radius`` is negative, or an array is not (N, 2).
    """
    if radius < 0:
        raise ValueError(f"radius is {radius}; it must not be negative.")
    marks = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    found = np.asarray(centroids, dtype=np.float64).reshape(-1, 2)
    if not len(marks):
        return 1.0
    if labels is not None:
        rows, columns = np.nonzero(np.asarray(labels))
        found = np.concatenate([found, np.stack([columns, rows], axis=1)])
    if not len(found):
        return 0.0
    distance, _ = cKDTree(found).query(marks)
    return float((distance <= radius).mean())
