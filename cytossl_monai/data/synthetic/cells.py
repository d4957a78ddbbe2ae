"""Cells drawn by rule: the stamps that synthetic slides are composed of.

A cell is an image of optical density, ``-ln(transmitted / incident light)`` per channel. Densities of things that lie
on each other add up, as light through a stained preparation multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

__all__ = ["CELL_CLASSES", "LESION_CLASSES", "CellStamp", "Stain", "render_cell"]

LESION_CLASSES = ("lsil", "hsil")
CELL_CLASSES = ("superficial", "intermediate", "parabasal", "leukocyte", "debris", *LESION_CLASSES)

# Optical density per channel (R, G, B) of one unit of each dye, by eye from Papanicolaou slides.
_HAEMATOXYLIN = (1.45, 1.62, 0.86)
_LIGHT_GREEN = (0.62, 0.20, 0.16)
_EOSIN = (0.05, 0.60, 0.30)
_ORANGE_G = (0.04, 0.36, 0.95)
_MUCUS = (0.16, 0.17, 0.20)
_ANGLES = 360


@dataclass(frozen=True)
class Stain:
    """How a laboratory stains: the dyes' densities, each (3,) float32 for R, G, B."""

    haematoxylin: np.ndarray = field(default_factory=lambda: np.array(_HAEMATOXYLIN, np.float32))
    light_green: np.ndarray = field(default_factory=lambda: np.array(_LIGHT_GREEN, np.float32))
    eosin: np.ndarray = field(default_factory=lambda: np.array(_EOSIN, np.float32))
    orange: np.ndarray = field(default_factory=lambda: np.array(_ORANGE_G, np.float32))
    mucus: np.ndarray = field(default_factory=lambda: np.array(_MUCUS, np.float32))

    @classmethod
    def draw(cls, rng: np.random.Generator, jitter: float = 0.15) -> Stain:
        """A laboratory's stain: every dye's strength and hue vary by ``jitter`` (a share of 1)."""

        def vary(dye: tuple[float, float, float]) -> np.ndarray:
            strength = np.exp(rng.normal(0, jitter))
            hue = np.exp(rng.normal(0, jitter / 3, 3))
            return (np.array(dye) * strength * hue).astype(np.float32)

        return cls(*(vary(dye) for dye in (_HAEMATOXYLIN, _LIGHT_GREEN, _EOSIN, _ORANGE_G, _MUCUS)))


@dataclass(frozen=True)
class CellStamp:
    """One cell, ready to be laid on a slide.

    Args:
        kind: one of ``CELL_CLASSES``.
        density: (h, w, 3) float32 optical density, 0 around the cell.
        nucleus: x, y, w, h of the nucleus within the stamp, pixels; w and h are 0 where there is none.
    """

    kind: str
    density: np.ndarray
    nucleus: tuple[int, int, int, int]

    def turned(self, quarters: int, mirrored: bool) -> CellStamp:
        """The same cell turned by quarters (counter-clockwise) and then mirrored left to right."""
        density, (x, y, w, h) = self.density, self.nucleus
        for _ in range(quarters % 4):
            x, y, w, h = y, density.shape[1] - x - w, h, w
            density = np.rot90(density)
        if mirrored:
            x = density.shape[1] - x - w
            density = density[:, ::-1]
        return CellStamp(self.kind, density, (x, y, w, h))


@dataclass(frozen=True)
class _Look:
    """What the cells of one class look like. Lengths in micrometres; pairs are the ranges drawn from."""

    cell: tuple[float, float]
    nucleus: tuple[float, float]
    nucleus_density: tuple[float, float]
    cytoplasm_density: tuple[float, float]
    polygonal: float = 0.0
    cell_roughness: float = 0.05
    nucleus_roughness: float = 0.02
    chromatin: float = 0.15
    clumps_um: float = 0.5
    elongation: tuple[float, float] = (1.0, 1.35)
    halo: float = 0.0


_LOOKS = {
    "superficial": _Look((44, 60), (5.0, 6.4), (0.85, 1.15), (0.35, 0.75), polygonal=0.85, chromatin=0.08),
    "intermediate": _Look((36, 54), (7.4, 9.4), (0.5, 0.78), (0.35, 0.8), polygonal=0.6, chromatin=0.2),
    "parabasal": _Look((15, 25), (7.6, 10.0), (0.55, 0.9), (0.8, 1.5), polygonal=0.1, chromatin=0.2),
    "leukocyte": _Look((9, 12), (6.0, 8.0), (0.75, 1.15), (0.15, 0.45), chromatin=0.15),
    # Low grade: a mature cell whose nucleus is three times too large, dark, with a cleared zone around it.
    "lsil": _Look((32, 46), (12.0, 15.5), (0.7, 1.05), (0.4, 0.9), 0.5, 0.05, 0.03, 0.28, 0.7, (1.05, 1.45), halo=0.6),
    # High grade: a small immature cell that is nearly all nucleus, dark, coarse, with an irregular outline.
    "hsil": _Look((13.5, 20), (9.5, 13.0), (0.8, 1.2), (0.6, 1.3), 0.1, 0.06, 0.05, 0.32, 0.7, (1.1, 1.6)),
}


def render_cell(
    kind: str, rng: np.random.Generator, stain: Stain, mpp: float = 0.25, focus_um: float = 0.0
) -> CellStamp:
    """Draw one cell.

    Args:
        kind: one of ``CELL_CLASSES``.
        rng: source of everything random; the same state gives the same pixels.
        stain: the slide's stain.
        mpp: micrometres per pixel.
        focus_um: standard deviation of the blur of a cell that lies out of focus, micrometres.

    Returns:
        the stamp.

    Raises:
        ValueError: when ``kind`` is unknown.
    """
    if kind not in CELL_CLASSES:
        raise ValueError(f"kind must be one of {CELL_CLASSES}, not {kind!r}")
    if kind == "debris":
        density, nucleus = _debris(rng, stain, mpp), (0, 0, 0, 0)
    else:
        density, nucleus = _cell(kind, _LOOKS[kind], rng, stain, mpp, focus_um)
    if focus_um > 0:
        density = gaussian_filter(density, (focus_um / mpp, focus_um / mpp, 0))
    return CellStamp(kind, density.astype(np.float32), nucleus)


def _cell(
    kind: str, look: _Look, rng: np.random.Generator, stain: Stain, mpp: float, focus_um: float
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    radius = rng.uniform(*look.cell) / 2 / mpp
    nucleus_radius = min(rng.uniform(*look.nucleus) / 2 / mpp, 0.85 * radius)
    outline = _outline(rng, look.cell_roughness, look.polygonal, rng.uniform(*look.elongation))
    half = int(np.ceil(radius * outline.max() + (1.0 + 3 * focus_um) / mpp)) + 1
    ys, xs = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)

    # Cytoplasm: thin, a little thicker at its rim, finely mottled, with a fold here and there.
    depth = _depth(xs, ys, radius * outline)
    body = _step(depth, 0.35 / mpp)
    amount = rng.uniform(*look.cytoplasm_density)
    film = (
        1
        + 0.18 * np.exp(-((depth / (1.2 / mpp)) ** 2))
        + _mottle(rng, xs.shape, (0.4 / mpp, 1.5 / mpp, 6.0 / mpp), (0.06, 0.08, 0.16))
    )
    if look.polygonal > 0.3:
        film += _folds(rng, xs, ys, radius, mpp)
    room = max(radius * outline.min() - nucleus_radius * 1.25, 0) * 0.45
    direction, distance = rng.uniform(0, 2 * np.pi), room * np.sqrt(rng.random())
    dx, dy = np.float32(distance * np.cos(direction)), np.float32(distance * np.sin(direction))

    # Nucleus: a membrane line, chromatin finely dispersed or in clumps.
    if kind == "leukocyte":
        inside = _lobes(rng, xs - dx, ys - dy, nucleus_radius, mpp)
        rim = np.zeros_like(inside)
    else:
        edge = _outline(rng, look.nucleus_roughness, 0.0, rng.uniform(*look.elongation))
        nucleus_depth = _depth(xs - dx, ys - dy, nucleus_radius * edge)
        inside = _step(nucleus_depth, 0.18 / mpp)
        rim = np.exp(-(((nucleus_depth - 0.35 / mpp) / (0.35 / mpp)) ** 2))
        if look.halo:
            away = np.maximum(-nucleus_depth, 0) * mpp
            film *= 1 - look.halo * rng.uniform(0.4, 1) * np.exp(-((away / 4.0) ** 2)) * (away > 0)
    texture = _mottle(rng, xs.shape, (look.clumps_um / mpp, 0.3 / mpp), (look.chromatin, look.chromatin / 2))
    chromatin = np.clip(1 + texture + 0.35 * rim, 0.25, 2.2) * rng.uniform(*look.nucleus_density)

    dye = _cytoplasm_dye(kind, rng, stain)
    cytoplasm = np.clip(body * film, 0, None) * amount
    density = cytoplasm[..., None] * dye + (inside * chromatin)[..., None] * stain.haematoxylin
    if kind == "superficial" and rng.random() < 0.5:
        density += (_granules(rng, xs.shape, 25, mpp) * body)[..., None] * stain.haematoxylin * 0.35
    found = np.argwhere(inside > 0.5)
    (top, left), (bottom, right) = found.min(0), found.max(0) + 1
    return density, (int(left), int(top), int(right - left), int(bottom - top))


def _cytoplasm_dye(kind: str, rng: np.random.Generator, stain: Stain) -> np.ndarray:
    """The cytoplasm's colour: pink to orange in mature cells, blue-green in young ones, and now and then between."""
    pink = {"superficial": 0.97, "intermediate": 0.15, "parabasal": 0.06, "lsil": 0.25, "hsil": 0.08, "leukocyte": 0.1}[
        kind
    ]
    share = np.float32(np.clip(rng.normal(0.9 if rng.random() < pink else 0.06, 0.07), 0, 1))
    orange = np.float32(rng.beta(1.2, 3.0))
    warm = (1 - orange) * stain.eosin + orange * stain.orange
    return share * warm + (1 - share) * stain.light_green + np.float32(0.04) * stain.haematoxylin


def _outline(rng: np.random.Generator, roughness: float, polygonal: float, elongation: float) -> np.ndarray:
    """A closed outline: (360,) float32 radius per degree with mean about 1."""
    angle = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    radius = np.ones(_ANGLES)
    if polygonal:
        sides = int(rng.integers(5, 8))
        normals = (np.arange(sides) + rng.uniform(-0.25, 0.25, sides)) * (2 * np.pi / sides)
        reach = rng.uniform(0.8, 1.1, sides)[:, None] / np.maximum(np.cos(angle - normals[:, None]), 1e-3)
        polygon = gaussian_filter1d(reach.min(axis=0), 5, mode="wrap")
        radius = (1 - polygonal) * radius + polygonal * polygon / polygon.mean()
        # A flat cell's edge is slightly frayed.
        radius += 0.012 * gaussian_filter1d(rng.standard_normal(_ANGLES), 1.2, mode="wrap")
    for k in range(2, 12):
        radius += roughness * rng.normal() / (k / 2) ** 0.8 * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    # An ellipse of the same area, turned at random.
    turn = rng.uniform(0, np.pi)
    stretch = np.sqrt(elongation)
    ellipse = 1 / np.sqrt((np.cos(angle - turn) / stretch) ** 2 + (np.sin(angle - turn) * stretch) ** 2)
    return (np.clip(radius, 0.4, None) * ellipse).astype(np.float32)


def _depth(xs: np.ndarray, ys: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """How deep inside an outline each pixel lies (pixels along the ray from its centre; negative outside)."""
    angle = np.arctan2(ys, xs) * np.float32(_ANGLES / (2 * np.pi)) % _ANGLES
    low = angle.astype(np.int32) % _ANGLES
    share = angle - low
    reach = outline[low] * (1 - share) + outline[(low + 1) % _ANGLES] * share
    return reach - np.hypot(xs, ys)


def _step(depth: np.ndarray, softness: float) -> np.ndarray:
    """0 outside to 1 inside, over about two ``softness`` pixels."""
    return 1 / (1 + np.exp(-np.clip(depth / max(softness, 0.3) * 2, -30, 30)))


def _mottle(
    rng: np.random.Generator, shape: tuple[int, ...], sigmas: tuple[float, ...], strengths: tuple[float, ...]
) -> np.ndarray:
    """Smooth noise: a sum of Gaussian-filtered noises, each scaled to its standard deviation."""
    total = np.zeros(shape, np.float32)
    for sigma, strength in zip(sigmas, strengths):
        # Coarse noise is drawn on a coarse grid: far cheaper, and smooth all the same.
        stride = max(1, int(sigma / 2))
        small = tuple(-(-n // stride) + 2 for n in shape)
        noise = gaussian_filter(rng.standard_normal(small, dtype=np.float32), sigma / stride, truncate=3.0)
        noise = _enlarge(noise, stride)[: shape[0], : shape[1]]
        total += noise * np.float32(strength / max(float(noise.std()), 1e-6))
    return total


def _enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Linear interpolation of (h, w) to ((h - 1) * factor, (w - 1) * factor)."""
    if factor == 1:
        return image
    share = (np.arange(factor, dtype=np.float32) / factor)[:, None]
    rows = (image[:-1, None] * (1 - share) + image[1:, None] * share).reshape(-1, image.shape[1])
    columns = rows[:, :-1, None] * (1 - share[:, 0]) + rows[:, 1:, None] * share[:, 0]
    return columns.reshape(len(rows), -1)


def _folds(rng: np.random.Generator, xs: np.ndarray, ys: np.ndarray, radius: float, mpp: float) -> np.ndarray:
    """Zero to two creases of a thin cell: slightly bent dark lines."""
    total = np.zeros_like(xs)
    for _ in range(int(rng.integers(0, 3))):
        turn = rng.uniform(0, np.pi)
        along = xs * np.cos(turn) + ys * np.sin(turn)
        across = -xs * np.sin(turn) + ys * np.cos(turn)
        across = across - rng.uniform(-0.6, 0.6) * radius - rng.normal(0, 0.25) * along**2 / radius
        total += rng.uniform(0.15, 0.5) * np.exp(-((across / (rng.uniform(0.5, 1.2) / mpp)) ** 2))
    return total


def _lobes(rng: np.random.Generator, xs: np.ndarray, ys: np.ndarray, radius: float, mpp: float) -> np.ndarray:
    """A leukocyte's nucleus: two to four joined lobes, or one round one."""
    count = int(rng.choice([1, 2, 3, 4], p=[0.25, 0.25, 0.35, 0.15]))
    inside = np.zeros_like(xs)
    start = rng.uniform(0, 2 * np.pi)
    size = radius if count == 1 else radius * 0.55
    for i in range(count):
        angle = start + i * rng.uniform(1.2, 1.9)
        away = 0 if count == 1 else radius * 0.5
        depth = _depth(xs - away * np.cos(angle), ys - away * np.sin(angle), size * _outline(rng, 0.04, 0, 1.2))
        inside = np.maximum(inside, _step(depth, 0.2 / mpp))
    return inside


def _granules(rng: np.random.Generator, shape: tuple[int, ...], count: int, mpp: float) -> np.ndarray:
    """Small dark dots (keratohyalin), (h, w)."""
    dots = np.zeros(shape, np.float32)
    dots[rng.integers(0, shape[0], count), rng.integers(0, shape[1], count)] = 1
    sigma = 0.3 / mpp
    return gaussian_filter(dots, sigma) * np.float32(2 * np.pi * sigma**2)


def _debris(rng: np.random.Generator, stain: Stain, mpp: float) -> np.ndarray:
    """Mucus strands, granular background and specks: stained, but no cell."""
    half = int(rng.uniform(6, 26) / mpp)
    ys, xs = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    depth = _depth(xs, ys, half * 0.45 * _outline(rng, 0.15, 0, rng.uniform(1, 1.8)))
    shape = _step(depth, 4.0 / mpp) * _step(half * 0.95 - np.hypot(xs, ys), 1.0 / mpp)
    grain = np.clip(_mottle(rng, xs.shape, (0.5 / mpp, 2.0 / mpp), (0.6, 0.5)) + 0.3, 0, None)
    density = (shape * grain * rng.uniform(0.5, 2.0))[..., None] * stain.mucus
    density += (shape * _granules(rng, xs.shape, int(rng.integers(5, 60)), mpp))[..., None] * stain.haematoxylin * 0.3
    return density
