"""The component tree of many planes at once against loops over planes, levels and regions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from cytossl_monai.transforms.nuclei.batch import _edge_step, noise_levels, pick_regions
from cytossl_monai.transforms.nuclei.labels import label_levels
from cytossl_monai.transforms.nuclei.regions import RegionRules

MPP = 0.75


def blobs(planes: int = 4, height: int = 50, width: int = 61, noise: float = 0.01) -> torch.Tensor:
    """Planes of soft discs of all sizes, some of them touching or inside one another; the last plane is empty."""
    rng = np.random.default_rng(5)
    density = rng.normal(0.02, noise, (planes, height, width))
    y, x = np.mgrid[:height, :width]
    for plane in density[:-1]:
        for _ in range(9):
            centre, radius = rng.uniform(0, (height, width)), rng.uniform(2, 14)
            distance = np.hypot(y - centre[0], x - centre[1])
            plane += rng.uniform(0.05, 0.6) / (1 + np.exp((distance - radius) / 0.7))
    return torch.from_numpy(np.maximum(density, 0).astype(np.float32))


def levels_of(density: torch.Tensor, count: int = 9) -> torch.Tensor:
    low, high = density.flatten(1).amin(1) + 0.03, density.flatten(1).amax(1)
    return low + (high - low) * torch.arange(count)[:, None] / count


def likeness_of(region: np.ndarray, step: np.ndarray, floor: float, rules: RegionRules) -> float:
    """As documented at ``RegionRules``, for one region."""
    rows, columns = np.nonzero(region)
    area = len(rows)
    cov = np.cov(np.stack([rows, columns]), bias=True) + np.eye(2) / 12
    minor, major = np.linalg.eigvalsh(cov)
    rim = region & ~ndimage.binary_erosion(region, border_value=1)
    contrast, support = step[rim].mean(), (step[rim] >= 0.5 * rules.min_contrast).mean()
    diameter = 2 * np.sqrt(area / np.pi) * MPP
    size = np.clip(
        min(
            (diameter - rules.min_diameter) / (rules.typical_diameter - rules.min_diameter),
            (rules.max_diameter - diameter) / (rules.max_diameter - rules.large_diameter),
        ),
        0,
        1,
    )
    roundness = area / (4 * np.pi * np.sqrt(major * minor))
    likeness = contrast * support * size * (roundness / 0.97) ** rules.roundness_power
    likeness *= min(1.0, rules.elongation_free * np.sqrt(minor / major)) ** 2
    return float(likeness) if likeness >= rules.min_likeness and contrast >= floor else 0.0


def pick_by_loops(plane: np.ndarray, levels: np.ndarray, floor: float, step: np.ndarray) -> np.ndarray:
    """The level of the picked region of each pixel, infinite elsewhere."""
    rules = RegionRules()

    def best_of(inside: np.ndarray, level: int) -> tuple[float, list[tuple[np.ndarray, int]]]:
        """Score of a region's subtree and what is picked in it."""
        own = likeness_of(inside, step, floor, rules)
        scores, picked = [], []
        if level + 1 < len(levels):
            labels, count = ndimage.label(inside & (plane > levels[level + 1]))
            for label in range(1, count + 1):
                score, regions = best_of(labels == label, level + 1)
                scores.append(score)
                picked += regions
        above = [score for score in scores if score > 0]
        best = float(np.mean(above)) if above else 0.0
        if own > 0 and own >= best:
            return max(own, best), [(inside, level)]
        return max(own, best), picked

    bar = np.full(plane.shape, np.inf, np.float32)
    labels, count = ndimage.label(plane > levels[0])
    for label in range(1, count + 1):
        for region, level in best_of(labels == label, 0)[1]:
            bar[region] = levels[level]
    return bar


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
def test_regions_are_those_that_loops_pick(noise: float) -> None:
    density = blobs(noise=noise)
    rules, levels = RegionRules(), levels_of(density)
    found = pick_regions(density, levels, MPP, rules).numpy()
    steps = _edge_step(density, rules.edge_reach / MPP).numpy()
    floors = (rules.noise_factor * noise_levels(density)).clamp_min(rules.min_contrast).tolist()
    picked = 0
    for plane in range(len(density)):
        expected = pick_by_loops(density[plane].numpy(), levels[:, plane].numpy(), floors[plane], steps[plane])
        np.testing.assert_allclose(found[plane], expected, rtol=1e-6)
        picked += len(np.unique(expected)) - 1
    assert picked >= 5
    assert np.isinf(found[-1]).all()


def test_labels_of_levels_are_those_of_scipy() -> None:
    steps = torch.randint(0, 5, (3, 20, 17), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    steps[1, 5:9] = 0  # rows that are left out
    labels = label_levels(steps, 6)
    assert labels.first == sorted(labels.first)
    assert labels.first[-1] == labels.first[4]  # no pixel lies above the last two levels
    for level in range(4):
        seen: set[int] = set()
        for plane in range(3):
            expected, count = ndimage.label(steps[plane].numpy() > level)
            pixel = torch.from_numpy(np.flatnonzero(expected)) + plane * 20 * 17
            found = labels.of(level, pixel).numpy()
            pairs = set(zip(expected[expected > 0].tolist(), found.tolist()))
            assert len(pairs) == count == len({label for _, label in pairs})  # one to one
            seen |= {label for _, label in pairs}
        assert seen == set(range(labels.first[level] + 1, labels.first[level + 1] + 1))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 7), (2, 9, 1), (1, 2, 2)])
def test_planes_of_a_pixel_or_a_line(shape: tuple[int, int, int]) -> None:
    density = torch.rand(shape)
    assert pick_regions(density, levels_of(density, 3), MPP, RegionRules()).shape == shape
    assert torch.isinf(pick_regions(torch.zeros(shape), torch.full((3, shape[0]), 0.1), MPP, RegionRules())).all()
