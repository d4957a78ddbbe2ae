"""Parting nuclei that touch: by the neck between them, where no change of density shows where one ends."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import regionprops
from skimage.morphology import h_maxima
from skimage.segmentation import watershed

__all__ = ["split_touching"]


def split_touching(
    labels: NDArray[np.int32],
    mpp: float,
    min_diameter: float = 4.0,
    neck: float = 0.8,
    max_solidity: float = 0.97,
    min_solidity: float = 0.87,
) -> NDArray[np.int32]:
    """Cut regions in two (or more) where they are narrow.

    The distance to the region's border has a summit in each nucleus and a saddle in the neck between two. A region is
    cut where the saddle is lower than ``neck`` times the lower summit, by a watershed from the summits.

    Args:
        labels: int32 (H, W), 0 is background.
        mpp: micrometres per pixel.
        min_diameter: equivalent diameter in micrometres that each part must have; smaller parts are left where they
            are, so that the lobes of a granulocyte and ragged borders stay whole.
        neck: widest neck, as a part of the smaller nucleus' width. 0.8 parts two equal discs that overlap by up to
            an eighth of their diameter.
        max_solidity: regions at least so convex have no neck and are not looked at.
        min_solidity: how convex each part must be: nuclei are, the pieces of a ragged region are not.

    Returns:
        int32 (H, W): the labels that were there keep their numbers for the largest of their parts.
    """
    result = labels.copy()
    following = int(labels.max(initial=0)) + 1
    smallest = np.pi * (min_diameter / mpp / 2) ** 2
    for region in regionprops(labels):
        if region.area < 2 * smallest or region.solidity >= max_solidity:
            continue
        inside = np.pad(region.image, 1)
        depth = ndimage.distance_transform_edt(inside)
        # h_maxima takes one height for all summits: that of the highest. Lower summits are held to their own below.
        summits, count = ndimage.label(h_maxima(depth, (1 - neck) * float(depth.max()) * 0.5), np.ones((3, 3)))
        if count < 2:
            continue
        parts = watershed(-depth, summits, mask=inside)
        parts = _join(parts, depth, neck, smallest)[1:-1, 1:-1]
        if any(part.solidity < min_solidity for part in regionprops(parts)):
            continue
        sizes = np.bincount(parts.ravel())[1:]
        window = result[region.slice]
        for part in np.argsort(sizes)[::-1][1:]:
            if sizes[part]:
                window[parts == part + 1] = following
                following += 1
    return result


def _join(parts: NDArray[np.int32], depth: NDArray[np.float64], neck: float, smallest: float) -> NDArray[np.int32]:
    """Undo the cuts between parts whose neck is too wide, or of which one is too small; widest neck first."""
    parts = parts.copy()
    while True:
        saddles = _saddles(parts, depth)
        summit = ndimage.maximum(depth, parts, np.arange(parts.max() + 1))
        area = np.bincount(parts.ravel())
        wide = {
            pair: height / min(summit[pair[0]], summit[pair[1]])
            for pair, height in saddles.items()
            if height > neck * min(summit[pair[0]], summit[pair[1]]) or min(area[pair[0]], area[pair[1]]) < smallest
        }
        if not wide:
            return parts
        keep, gone = max(wide, key=lambda pair: wide[pair])
        parts[parts == gone] = keep


def _saddles(parts: NDArray[np.int32], depth: NDArray[np.float64]) -> dict[tuple[int, int], float]:
    """Greatest depth at which two parts touch, for each pair of neighbours."""
    found: dict[tuple[int, int], float] = {}
    for axis in (0, 1):
        n = parts.shape[axis] - 1
        one, two = (np.take(parts, range(start, start + n), axis) for start in (0, 1))
        low = np.minimum(*(np.take(depth, range(start, start + n), axis) for start in (0, 1)))
        meet = (one != two) & (one > 0) & (two > 0)
        for a, b, height in zip(one[meet].tolist(), two[meet].tolist(), low[meet].tolist()):
            pair = (min(a, b), max(a, b))
            found[pair] = max(found.get(pair, 0.0), height)
    return found
