"""Tiles drawn with nuclei whose place and size are known, in the colours of several stains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

# Colours of glass, cytoplasm and nucleus, RGB; typical of each stain, none taken from the code under test.
STAINED = {
    "pap_blue": ((238, 240, 242), (150, 196, 200), (66, 62, 104)),
    "pap_orange": ((238, 240, 242), (236, 170, 110), (70, 58, 84)),
    "pap_pink": ((238, 240, 242), (226, 150, 178), (78, 60, 110)),
    "giemsa": ((240, 238, 242), (150, 160, 210), (96, 44, 132)),
    "he": ((242, 238, 242), (232, 160, 196), (88, 62, 138)),
    "grey": ((226, 226, 226), (178, 178, 178), (92, 92, 92)),
}


@dataclass(frozen=True)
class Disc:
    """A nucleus: centre and diameter in micrometres; ``strength`` weakens (below 1) its stain."""

    x: float
    y: float
    diameter: float = 8.0
    strength: float = 1.0


def draw(
    discs: list[Disc],
    stain: str = "pap_blue",
    mpp: float = 0.5,
    side_um: float = 64.0,
    cell_um: float = 34.0,
    noise: float = 2.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """A tile and its true instance map.

    Cells are ellipses around each nucleus; stains add up in optical density; edges are as soft as an objective's.

    Returns:
        uint8 (3, H, W), or (1, H, W) for ``"grey"``, and int32 (H, W).
    """
    rng = np.random.default_rng(seed)
    n = round(side_um / mpp)
    y, x = (np.mgrid[:n, :n] + 0.5) * mpp
    glass, cytoplasm, nucleus = (-np.log(np.array(c) / 255.0) for c in STAINED[stain])
    density = np.tile(glass[:, None, None], (1, n, n))
    labels = np.zeros((n, n), np.int32)
    if cell_um:
        for disc in discs:
            inside = ((x - disc.x) / cell_um) ** 2 + ((y - disc.y) / (0.8 * cell_um)) ** 2 < 0.25
            density += (cytoplasm - glass)[:, None, None] * inside * 0.5 ** (density[0] > glass[0] + 0.01)
    for number, disc in enumerate(discs, start=1):
        labels[(x - disc.x) ** 2 + (y - disc.y) ** 2 < (disc.diameter / 2) ** 2] = number
    for number, disc in enumerate(discs, start=1):
        density += (nucleus - (cytoplasm if cell_um else glass))[:, None, None] * disc.strength * (labels == number)
    light = ndimage.gaussian_filter(np.exp(-density), (0, 0.25 / mpp, 0.25 / mpp)) * 255
    light += rng.normal(0, noise, light.shape)
    pixels = np.clip(light, 0, 255).round().astype(np.uint8)
    return (pixels[:1] if stain == "grey" else pixels), labels


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap of two masks, counted pixel by pixel."""
    a, b = np.asarray(a) > 0, np.asarray(b) > 0
    return 2 * np.logical_and(a, b).sum() / max(a.sum() + b.sum(), 1)
