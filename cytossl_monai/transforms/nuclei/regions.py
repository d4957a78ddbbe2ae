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
from typing import Any

import numpy as np

from cytossl_monai.transforms.nuclei.backend import CPU, ArrayBackend

__all__ = ["RegionRules", "select_regions"]


@dataclass(frozen=True)
class RegionRules:
    """What counts as a nucleus: hard limits, and the scale on which the rest is weighed against each other.

    The likeness of a region to a nucleus is its contrast, scaled down for what is small, large, elongated or ragged::

        contrast * support * size * (roundness / 0.97) ** roundness_power * min(1, elongation_free / elongation) ** 2

    with ``size`` rising linearly from 0 at ``min_diameter`` to 1 at ``typical_diameter``, and falling from 1 at
    ``large_diameter`` to 0 at ``max_diameter``. So a speck must be far darker than its surroundings, a large pale
    nucleus need not be.

    Args:
        min_diameter: equivalent diameter in micrometres at and below which nothing is a nucleus.
        typical_diameter: from this diameter on size speaks for a nucleus as much as it can.
        large_diameter: from this diameter on size speaks against it.
        max_diameter: equivalent diameter in micrometres at and above which nothing is a nucleus.
        min_contrast: smallest mean step in optical density across the edge.
        noise_factor: the step must also be this many times the noise of the tile (a robust standard deviation).
        max_noise: standard deviation of a tile's noise, in optical density, above which nothing in it is a nucleus:
            cameras add a tenth of it, and of more chance alone makes regions.
        min_likeness: smallest likeness.
        roundness_power: how much it costs to differ from an ellipse. Roundness is the ratio of a region's area to that
            of the ellipse with the same second moments, 1 for an ellipse.
        elongation_free: ratio of that ellipse's axes up to which elongation costs nothing.
        level_step: distance of the levels in optical density.
        edge_reach: micrometres from the edge, inwards and outwards, at which its two sides are compared.
        min_stain: least stain of what lies directly on clear glass: optical density in red, and in green above blue,
            lessened where it is uneven. Red cells hold less, and so does precipitate. 0 asks for none.
        min_colour: least difference of the densities in green and blue, as a part of that in green, in a tile whose
            nuclei are violet, as Giemsa stains them: crystals and soot are grey. 0 asks for none.

    Raises:
        ValueError: diameters that do not rise, or a step, reach or contrast that is not positive.
    """

    min_diameter: float = 2.8
    typical_diameter: float = 7.5
    large_diameter: float = 14.0
    max_diameter: float = 28.0
    min_contrast: float = 0.06
    noise_factor: float = 2.5
    max_noise: float = 0.12
    min_likeness: float = 0.05
    roundness_power: float = 4.0
    elongation_free: float = 1.6
    level_step: float = 0.025
    edge_reach: float = 0.65
    min_stain: float = 0.3
    min_colour: float = 0.35

    def __post_init__(self) -> None:
        sizes = (self.min_diameter, self.typical_diameter, self.large_diameter, self.max_diameter)
        if not 0 <= sizes[0] < sizes[1] <= sizes[2] < sizes[3]:
            raise ValueError(f"The diameters {sizes} must rise: min, typical, large, max, in micrometres.")
        if min(self.min_contrast, self.level_step, self.edge_reach, self.elongation_free) <= 0:
            raise ValueError("min_contrast, level_step, edge_reach and elongation_free must be positive.")


@dataclass
class _Level:
    """Regions of one level, arrays of the backend: labels, scores, and the region one level below that each is in."""

    labels: Any
    score: Any
    parent: Any


def _edge_step(density: Any, reach: float, backend: ArrayBackend) -> Any:
    """Difference of the density a reach inwards and a reach outwards of every pixel, along its gradient."""
    xp, ndi = backend.xp, backend.ndimage
    rows = ndi.gaussian_filter1d(ndi.gaussian_filter1d(density, 1.0, axis=0, order=1), 1.0, axis=1)
    columns = ndi.gaussian_filter1d(ndi.gaussian_filter1d(density, 1.0, axis=1, order=1), 1.0, axis=0)
    norm = xp.maximum(xp.hypot(rows, columns), 1e-6)
    rows, columns = reach * rows / norm, reach * columns / norm
    at_r = xp.arange(density.shape[0], dtype=xp.float32)[:, None]
    at_c = xp.arange(density.shape[1], dtype=xp.float32)[None, :]
    inner = ndi.map_coordinates(density, xp.stack([at_r + rows, at_c + columns]), order=1, mode="nearest")
    outer = ndi.map_coordinates(density, xp.stack([at_r - rows, at_c - columns]), order=1, mode="nearest")
    return inner - outer


def noise_level(density: Any, backend: ArrayBackend = CPU) -> float:
    """Robust standard deviation of the noise: from the second differences that a slow image would not have."""
    if min(density.shape) < 3:
        return 0.0
    mixed = density[:-2, :-2] - 2 * density[:-2, 1:-1] + density[:-2, 2:]
    mixed = mixed - 2 * (density[1:-1, :-2] - 2 * density[1:-1, 1:-1] + density[1:-1, 2:])
    mixed = mixed + density[2:, :-2] - 2 * density[2:, 1:-1] + density[2:, 2:]
    # The mask [1 -2 1] x [1 -2 1] has norm 6 (Immerkaer 1996); 0.6745 is the median of |N(0, 1)|.
    return float(backend.xp.median(backend.xp.abs(mixed))) / (6 * 0.6745)


def select_regions(density: Any, mpp: float, rules: RegionRules, backend: ArrayBackend = CPU) -> tuple[Any, Any]:
    """Pick the best non-overlapping regions.

    Args:
        density: float32 (H, W) nuclear density, smoothed, an array of the backend.
        mpp: micrometres per pixel.
        rules: what counts as a nucleus.
        backend: whose arrays these are.

    Returns:
        labels int32 (H, W), 0 where no nucleus is, and the score of each label, float32 (n,); arrays of the backend.
    """
    xp, ndi = backend.xp, backend.ndimage
    low, high = float(density.min()), float(density.max())
    levels = np.arange(low + 0.5 * rules.min_contrast, high, rules.level_step)
    if not len(levels):
        return xp.zeros(density.shape, xp.int32), xp.zeros(0, xp.float32)
    floor = max(rules.min_contrast, rules.noise_factor * noise_level(density, backend))
    step = _edge_step(density, rules.edge_reach / mpp, backend)
    supported = (step >= 0.5 * rules.min_contrast).astype(xp.float32)
    eroded = ndi.minimum_filter(density, footprint=ndi.generate_binary_structure(2, 1), mode="nearest")
    order = xp.argsort(density.ravel())[::-1]
    above = xp.searchsorted(-density.ravel()[order], xp.asarray(-levels, dtype=density.dtype), side="left").tolist()
    step, supported, eroded_flat = step.ravel(), supported.ravel(), eroded.ravel()
    width = density.shape[1]
    tree: list[_Level] = []
    previous: Any = None
    for level, count_above in zip(levels.astype(np.float32).tolist(), above):
        pixels = order[:count_above]
        labels, count = ndi.label(density > level)
        if count == 0:
            break
        owner = labels.ravel()[pixels]
        n = count + 1
        area = xp.bincount(owner, minlength=n)
        r, c = (pixels // width).astype(xp.float64), (pixels % width).astype(xp.float64)
        safe = xp.maximum(area, 1)
        mean_r, mean_c = xp.bincount(owner, r, n) / safe, xp.bincount(owner, c, n) / safe
        r, c = r - mean_r[owner], c - mean_c[owner]
        # A pixel is a square, not a point: 1/12 is its own variance.
        var_r = xp.bincount(owner, r * r, n) / safe + 1 / 12
        var_c = xp.bincount(owner, c * c, n) / safe + 1 / 12
        cov = xp.bincount(owner, r * c, n) / safe
        root = xp.sqrt(((var_r - var_c) / 2) ** 2 + cov**2)
        major, minor = (var_r + var_c) / 2 + root, xp.maximum((var_r + var_c) / 2 - root, 1e-9)
        roundness = area / (4 * np.pi * xp.sqrt(major * minor))
        elongation = xp.sqrt(major / minor)
        rim = eroded_flat[pixels] <= level
        rim_pixels, rim_owner = pixels[rim], owner[rim]
        rim_length = xp.maximum(xp.bincount(rim_owner, minlength=n), 1)
        contrast = xp.bincount(rim_owner, step[rim_pixels], n) / rim_length
        support = xp.bincount(rim_owner, supported[rim_pixels], n) / rim_length
        diameter = 2 * xp.sqrt(area / np.pi) * mpp
        size = xp.minimum(
            (diameter - rules.min_diameter) / (rules.typical_diameter - rules.min_diameter),
            (rules.max_diameter - diameter) / (rules.max_diameter - rules.large_diameter),
        )
        likeness = (
            contrast
            * support
            * xp.clip(size, 0.0, 1.0)
            * (roundness / 0.97) ** rules.roundness_power
            * xp.minimum(1.0, rules.elongation_free / elongation) ** 2
        )
        fit = (likeness >= rules.min_likeness) & (contrast >= floor)
        score = xp.where(fit, likeness, 0.0).astype(xp.float32)
        score[0] = 0.0
        parent = xp.zeros(n, xp.int64)
        if previous is not None:
            first = xp.zeros(n, xp.int64)
            first[owner] = pixels  # any pixel of the region will do: all of them lie in the same one below
            parent = previous.ravel()[first].astype(xp.int64)
        tree.append(_Level(labels.astype(xp.int32, copy=False), score, parent))
        previous = tree[-1].labels
    return _best_cut(tree, density.shape, xp)


def _best_cut(tree: list[_Level], shape: tuple[int, ...], xp: Any) -> tuple[Any, Any]:
    """Go down the tree from its tips: a region stays unless the regions inside it are better on the average."""
    result = xp.zeros(shape, xp.int32)
    kept: list[Any] = []
    inherited = xp.zeros(1, xp.float32)
    for index in range(len(tree) - 1, -1, -1):
        level = tree[index]
        n = len(level.score)
        best = xp.zeros(n, xp.float32)
        if index + 1 < len(tree):
            above = tree[index + 1]
            has = inherited > 0
            weight = xp.bincount(above.parent[has], minlength=n)
            total = xp.bincount(above.parent[has], inherited[has], n)
            best = (total / xp.maximum(weight, 1)).astype(xp.float32)
        take = (level.score > 0) & (level.score >= best)
        kept.append(take)
        inherited = xp.maximum(level.score, best)
    kept.reverse()
    scores: list[Any] = []
    covered = xp.zeros(1, bool)
    count = 0
    for index, level in enumerate(tree):
        inside = covered[level.parent] if index else xp.zeros(len(level.score), bool)
        chosen = kept[index] & ~inside
        covered = inside | chosen
        new = int(chosen.sum())
        if new:
            number = xp.zeros(len(chosen), xp.int32)
            number[chosen] = xp.arange(count + 1, count + 1 + new, dtype=xp.int32)
            count += new
            where = chosen[level.labels]
            result[where] = number[level.labels[where]]
            scores.append(level.score[chosen])
    return result, xp.concatenate(scores) if scores else xp.zeros(0, xp.float32)
