"""The region picking of ``nuclei_regions`` for a whole batch at once, in PyTorch, on the device of the batch.

A batch is one stack of planes: components are formed in all planes by one call, and everything measured on them is a
sum over pixels grouped by component, so the work does not loop over samples. The loop that is left runs over levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from cytossl_monai.transforms.nuclei_regions import RegionRules

__all__ = ["label_planes", "noise_levels", "pick_regions"]

_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)


_NOISE_ROWS = 4  # noise is measured on every fourth row of tiles that have enough of them


@dataclass
class _Level:
    """Regions of one level.

    Attributes:
        pixels: (P,) int64, positions in the flattened stack of the pixels of regions that can be a nucleus.
        owner: (P,) int64, the region of each.
        likeness: (n + 1,) float32, of each region; 0 stands for none.
        parent: (n + 1,) int64, the region one level below in which each lies; 0 for what is too large for a nucleus.
    """

    pixels: torch.Tensor
    owner: torch.Tensor
    likeness: torch.Tensor
    parent: torch.Tensor


def _spread(labels: torch.Tensor) -> torch.Tensor:
    """Greatest label among a pixel and its four neighbours in the plane."""
    spread = labels.clone()
    spread[:, 1:] = torch.maximum(spread[:, 1:], labels[:, :-1])
    spread[:, :-1] = torch.maximum(spread[:, :-1], labels[:, 1:])
    spread[:, :, 1:] = torch.maximum(spread[:, :, 1:], labels[:, :, :-1])
    spread[:, :, :-1] = torch.maximum(spread[:, :, :-1], labels[:, :, 1:])
    return spread


def label_planes(mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """4-connected components of every plane of a stack, numbered through the stack.

    Args:
        mask: bool (B, H, W). On a CPU SciPy labels the stack in one call; elsewhere labels spread between neighbours
            and along the pointers that they are, until nothing changes (about ten rounds for a tile).

    Returns:
        int32 (on a CPU) or int64 (B, H, W), 0 outside, 1..n inside; and n.
    """
    if mask.device.type == "cpu":
        labels, count = ndimage.label(mask.numpy(), structure=_IN_PLANE)
        return torch.from_numpy(labels), int(count)
    return _label_by_spreading(mask)


def _label_by_spreading(mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``label_planes`` in tensor operations alone, for devices that SciPy cannot reach."""
    pixels = torch.arange(1, mask.numel() + 1, device=mask.device).view(mask.shape)
    current = torch.where(mask, pixels, 0)
    while True:
        spread = torch.where(mask, _spread(current), 0)
        # A label is the index of a pixel: what that pixel has learned in the meantime holds for this one as well.
        table = torch.cat([spread.new_zeros(1), spread.flatten()])
        spread = table[table[spread]]
        if torch.equal(spread, current):
            break
        current = spread
    values, inverse = torch.unique(current, return_inverse=True)
    offset = 0 if values.numel() and int(values[0]) == 0 else 1
    return inverse + offset, int(values.numel()) - 1 + offset


def noise_levels(density: torch.Tensor) -> torch.Tensor:
    """Robust standard deviation of the noise of every plane, float32 (B,); see ``nuclei_regions.noise_level``."""
    height = density.shape[-2]
    if min(density.shape[-2:]) < 3:
        return density.new_zeros(density.shape[0])
    stride = _NOISE_ROWS if height >= 16 * _NOISE_ROWS else 1
    above, middle, below = (density[:, start : height - 2 + start : stride] for start in range(3))
    mixed = above - 2 * middle + below
    mixed = mixed[..., :-2] - 2 * mixed[..., 1:-1] + mixed[..., 2:]
    return mixed.abs().flatten(1).median(dim=1).values / (6 * 0.6745)


def _edge_step(density: torch.Tensor, reach: float) -> torch.Tensor:
    """Difference of the density across ``reach`` pixels to either side, from Sobel's gradient."""
    padded = torch.nn.functional.pad(density[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    smooth = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    columns = smooth[..., 2:] - smooth[..., :-2]
    smooth = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    rows = smooth[:, 2:] - smooth[:, :-2]
    return torch.hypot(rows, columns) * (reach / 4.0)


def _grouped(owner: torch.Tensor, n: int, *values: torch.Tensor) -> list[torch.Tensor]:
    # bincount of nothing forgets the type of its weights.
    return [torch.bincount(owner, weights=value, minlength=n).double() for value in values]


def pick_regions(
    density: torch.Tensor, levels: torch.Tensor, mpp: float, rules: RegionRules
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick the best non-overlapping regions of every plane.

    Args:
        density: float32 (B, H, W) nuclear density.
        levels: float32 (L, B), rising along the first axis: levels at which each plane is cut.
        mpp: micrometres per pixel.
        rules: what counts as a nucleus.

    Returns:
        region bool (B, H, W), and the level at which each picked pixel's region was cut, float32 (B, H, W), infinite
        outside.
    """
    height, width = density.shape[-2:]
    floor = (rules.noise_factor * noise_levels(density)).clamp_min(rules.min_contrast)
    step = _edge_step(density, rules.edge_reach / mpp)
    low = torch.nn.functional.pad(density[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    eroded = torch.minimum(
        torch.minimum(low[:, :-2, 1:-1], low[:, 2:, 1:-1]), torch.minimum(low[:, 1:-1, :-2], low[:, 1:-1, 2:])
    )
    largest = torch.pi * (rules.max_diameter / mpp / 2) ** 2
    flat_density, flat_eroded, flat_step = density.flatten(), eroded.flatten(), step.flatten()
    tree: list[_Level] = []
    previous: torch.Tensor | None = None
    inside = (density > levels[0][:, None, None]).flatten().nonzero().flatten()
    home = torch.div(inside, height * width, rounding_mode="floor")
    for level in levels:
        labels, count = label_planes(density > level[:, None, None])
        if count == 0:
            break
        # Levels nest: what was below an earlier one need not be looked at again.
        above = flat_density[inside] > level[home]
        inside, home = inside[above], home[above]
        flat = labels.flatten()
        owner = flat[inside].long()
        n = count + 1
        area = torch.bincount(owner, minlength=n)
        # What is too large is no nucleus, and nothing below it in the tree is: its pixels need no further look.
        candidate = area <= largest
        small = candidate[owner]
        pixels, owner, plane = inside[small], owner[small], home[small]
        r = torch.div(pixels, width, rounding_mode="floor").remainder(height).double()
        c = pixels.remainder(width).double()
        sum_r, sum_c, sum_rr, sum_cc, sum_rc = _grouped(owner, n, r, c, r * r, c * c, r * c)
        mean_r, mean_c = sum_r / area, sum_c / area
        var_r, var_c = sum_rr / area - mean_r**2 + 1 / 12, sum_cc / area - mean_c**2 + 1 / 12
        root = (((var_r - var_c) / 2) ** 2 + (sum_rc / area - mean_r * mean_c) ** 2).sqrt()
        major, minor = (var_r + var_c) / 2 + root, ((var_r + var_c) / 2 - root).clamp_min(1e-9)
        at_rim = flat_eroded[pixels] <= level[plane]
        rim_step = flat_step[pixels[at_rim]].double()
        length, contrast, support = _grouped(
            owner[at_rim], n, torch.ones_like(rim_step), rim_step, (rim_step >= 0.5 * rules.min_contrast).double()
        )
        contrast, support = contrast / length.clamp_min(1), support / length.clamp_min(1)
        diameter = 2 * (area / torch.pi).sqrt() * mpp
        size = torch.minimum(
            (diameter - rules.min_diameter) / (rules.typical_diameter - rules.min_diameter),
            (rules.max_diameter - diameter) / (rules.max_diameter - rules.large_diameter),
        )
        roundness = area / (4 * torch.pi * (major * minor).sqrt())
        likeness = contrast * support * size.clamp(0, 1) * (roundness / 0.97) ** rules.roundness_power
        likeness = likeness * (rules.elongation_free * (minor / major).sqrt()).clamp_max(1) ** 2
        plane_of = torch.zeros(n, dtype=torch.long, device=density.device)
        plane_of[owner] = plane
        fit = (likeness >= rules.min_likeness) & (contrast >= floor[plane_of])
        fit &= candidate
        fit[0] = False
        parent = torch.zeros(n, dtype=torch.long, device=density.device)
        if previous is not None:
            parent[owner] = previous[pixels].long()  # the same for all pixels of a region
        tree.append(_Level(pixels, owner, torch.where(fit, likeness, 0.0).float(), parent))
        previous = flat
    return _best_cut(tree, levels, density)


def _best_cut(tree: list[_Level], levels: torch.Tensor, density: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``nuclei_regions._best_cut``: a region stays unless those inside it are better on the average."""
    bar = torch.full_like(density, float("inf")).flatten()
    plane_size = density.shape[-2] * density.shape[-1]
    taken: list[torch.Tensor] = [bar] * len(tree)
    inherited = parent = bar
    for index in range(len(tree) - 1, -1, -1):
        likeness = tree[index].likeness
        best = torch.zeros_like(likeness)
        if index + 1 < len(tree):
            has = inherited > 0
            total, weight = torch.zeros_like(likeness), torch.zeros_like(likeness)
            total.index_add_(0, parent[has], inherited[has])
            weight.index_add_(0, parent[has], torch.ones_like(inherited[has]))
            best = total / weight.clamp_min(1)
        taken[index] = (likeness > 0) & (likeness >= best)
        inherited, parent = torch.maximum(likeness, best), tree[index].parent
    covered = bar
    for index, level in enumerate(tree):
        inside = covered[level.parent] if index else torch.zeros_like(taken[0])
        chosen = taken[index] & ~inside
        covered = inside | chosen
        picked = level.pixels[chosen[level.owner]]
        bar[picked] = levels[index][torch.div(picked, plane_size, rounding_mode="floor")]
    bar = bar.view_as(density)
    return bar.isfinite(), bar
