"""Regions that look like nuclei, picked from the component tree of a density image.

A density image is cut at many levels. A region is a connected component above one level; regions nest as the level
rises. Each is judged by the edge around it and by its shape, and of every nested family the best is kept. So each
nucleus finds a threshold of its own: pale and hyperchromatic nuclei in one tile do not compete, and nuclei that touch
at one level come apart at a higher one.

The idea is that of maximally stable extremal regions (Matas et al., BMVC 2002) as used for cells by Arteta et al.,
Learning to detect cells using non-overlapping extremal regions, MICCAI 2012; here nothing is learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["RegionRules", "select_regions"]

Float = NDArray[np.float32]


@dataclass(frozen=True)
class RegionRules:
    """What counts as a nucleus.

    Args:
        min_diameter: smallest equivalent diameter in micrometres.
        max_diameter: largest equivalent diameter in micrometres.
        min_contrast: smallest mean step in optical density across a nucleus' edge.
        min_support: smallest share of the edge that shows at least half of ``min_contrast``.
        min_roundness: smallest ratio of a region's area to that of the ellipse with the same second moments.
        max_elongation: largest ratio of the axes of that ellipse.
        level_step: distance of the levels in optical density.
        edge_reach: micrometres from the edge, inwards and outwards, at which its two sides are compared.
    """

    min_diameter: float = 3.6
    max_diameter: float = 26.0
    min_contrast: float = 0.12
    min_support: float = 0.7
    min_roundness: float = 0.85
    max_elongation: float = 3.2
    level_step: float = 0.025
    edge_reach: float = 0.9


@dataclass
class _Level:
    """Regions of one level: labels, their scores and the region of the level below in which each lies."""

    labels: NDArray[np.int32]
    score: Float
    area: Float
    parent: NDArray[np.int64]


def _edge_step(density: Float, reach: float) -> Float:
    """Difference of the density a reach inwards and a reach outwards of every pixel, along its gradient."""
    rows = ndimage.gaussian_filter1d(ndimage.gaussian_filter1d(density, 1.0, axis=0, order=1), 1.0, axis=1)
    columns = ndimage.gaussian_filter1d(ndimage.gaussian_filter1d(density, 1.0, axis=1, order=1), 1.0, axis=0)
    norm = np.maximum(np.hypot(rows, columns), 1e-6)
    rows, columns = reach * rows / norm, reach * columns / norm
    at_r, at_c = np.indices(density.shape, dtype=np.float32, sparse=True)
    inner = ndimage.map_coordinates(density, [at_r + rows, at_c + columns], order=1, mode="nearest")
    outer = ndimage.map_coordinates(density, [at_r - rows, at_c - columns], order=1, mode="nearest")
    return inner - outer


def select_regions(density: Float, mpp: float, rules: RegionRules) -> tuple[NDArray[np.int32], Float]:
    """Pick the best non-overlapping regions.

    Args:
        density: float32 (H, W) nuclear density, smoothed.
        mpp: micrometres per pixel.
        rules: what counts as a nucleus.

    Returns:
        labels int32 (H, W), 0 where no nucleus is, and the score of each label, float32 (n,).
    """
    low, high = float(density.min()), float(density.max())
    levels = np.arange(low + 0.5 * rules.min_contrast, high, rules.level_step)
    if not len(levels):
        return np.zeros(density.shape, np.int32), np.zeros(0, np.float32)
    step = _edge_step(density, rules.edge_reach / mpp)
    supported = (step >= 0.5 * rules.min_contrast).astype(np.float32)
    eroded = ndimage.minimum_filter(density, footprint=ndimage.generate_binary_structure(2, 1), mode="nearest")
    order = np.argsort(density, axis=None)[::-1]
    ranked = density.ravel()[order]
    step, supported, eroded_flat = step.ravel(), supported.ravel(), eroded.ravel()
    width = density.shape[1]
    tree: list[_Level] = []
    previous: NDArray[np.int32] | None = None
    for level in levels:
        pixels = order[: int(np.searchsorted(-ranked, -level, side="left"))]
        labels, count = ndimage.label(density > level)
        if count == 0:
            break
        owner = labels.ravel()[pixels]
        n = count + 1
        area = np.bincount(owner, minlength=n)
        r, c = (pixels // width).astype(np.float64), (pixels % width).astype(np.float64)
        mean_r = np.bincount(owner, r, n) / np.maximum(area, 1)
        mean_c = np.bincount(owner, c, n) / np.maximum(area, 1)
        r, c = r - mean_r[owner], c - mean_c[owner]
        safe = np.maximum(area, 1)
        # A pixel is a square, not a point: 1/12 is its own variance.
        var_r = np.bincount(owner, r * r, n) / safe + 1 / 12
        var_c = np.bincount(owner, c * c, n) / safe + 1 / 12
        cov = np.bincount(owner, r * c, n) / safe
        root = np.sqrt(((var_r - var_c) / 2) ** 2 + cov**2)
        major, minor = (var_r + var_c) / 2 + root, np.maximum((var_r + var_c) / 2 - root, 1e-9)
        roundness = area / (4 * np.pi * np.sqrt(major * minor))
        elongation = np.sqrt(major / minor)
        rim = eroded_flat[pixels] <= level
        rim_pixels, rim_owner = pixels[rim], owner[rim]
        rim_length = np.maximum(np.bincount(rim_owner, minlength=n), 1)
        contrast = np.bincount(rim_owner, step[rim_pixels], n) / rim_length
        support = np.bincount(rim_owner, supported[rim_pixels], n) / rim_length
        diameter = 2 * np.sqrt(area / np.pi) * mpp
        fit = (
            (diameter >= rules.min_diameter)
            & (diameter <= rules.max_diameter)
            & (contrast >= rules.min_contrast)
            & (support >= rules.min_support)
            & (roundness >= rules.min_roundness)
            & (elongation <= rules.max_elongation)
        )
        score = np.where(fit, contrast * support * roundness**2, 0.0).astype(np.float32)
        score[0] = 0.0
        parent = np.zeros(n, np.int64)
        if previous is not None:
            first = np.zeros(n, np.int64)
            first[owner] = pixels
            parent = previous.ravel()[first].astype(np.int64)
        tree.append(_Level(labels.astype(np.int32, copy=False), score, area.astype(np.float32), parent))
        previous = tree[-1].labels
    return _best_cut(tree, density.shape)


def _best_cut(tree: list[_Level], shape: tuple[int, ...]) -> tuple[NDArray[np.int32], Float]:
    """Go down the tree from its tips: a region stays unless the regions inside it are better on the average."""
    result = np.zeros(shape, np.int32)
    kept: list[NDArray[np.bool_]] = []
    inherited = np.zeros(1, np.float32)
    for index in range(len(tree) - 1, -1, -1):
        level = tree[index]
        n = len(level.score)
        best = np.zeros(n, np.float32)
        if index + 1 < len(tree):
            above = tree[index + 1]
            has = inherited > 0
            weight = np.bincount(above.parent[has], minlength=n)
            total = np.bincount(above.parent[has], inherited[has], n)
            best = np.where(weight > 0, total / np.maximum(weight, 1), 0.0).astype(np.float32)
        take = (level.score > 0) & (level.score >= best)
        kept.append(take)
        inherited = np.maximum(level.score, best)
    kept.reverse()
    scores: list[Float] = []
    covered = np.zeros(1, bool)
    count = 0
    for index, level in enumerate(tree):
        inside = covered[level.parent] if index else np.zeros(len(level.score), bool)
        chosen = kept[index] & ~inside
        covered = inside | chosen
        if chosen.any():
            number = np.zeros(len(chosen), np.int32)
            number[chosen] = np.arange(count + 1, count + 1 + int(chosen.sum()))
            count += int(chosen.sum())
            where = chosen[level.labels]
            result[where] = number[level.labels[where]]
            scores.append(level.score[chosen])
    return result, np.concatenate(scores) if scores else np.zeros(0, np.float32)
