"""The region picking of ``nuclei.regions`` for a whole batch at once, in PyTorch, on the device of the batch.

A batch is one stack of planes: components are formed in all planes by one call, and everything measured on them is a
sum over pixels grouped by component, so the work does not loop over samples. The loop that is left runs over levels.
"""

from __future__ import annotations

import torch

from cytossl_monai.transforms.kernels.device import grouped_sum
from cytossl_monai.transforms.nuclei.labels import among_neighbours, label_levels
from cytossl_monai.transforms.nuclei.regions import RegionRules

__all__ = ["noise_levels", "pick_regions"]

_NOISE_ROWS = 24  # noise is measured on about as many rows of a tile, evenly spread


def noise_levels(density: torch.Tensor) -> torch.Tensor:
    """Robust standard deviation of the noise of every plane, float32 (B,); see ``nuclei.regions.noise_level``."""
    height = density.shape[-2]
    if min(density.shape[-2:]) < 3:
        return density.new_zeros(density.shape[0])
    stride = max(1, height // _NOISE_ROWS)
    above, middle, below = (density[:, start : height - 2 + start : stride] for start in range(3))
    mixed = above - 2 * middle + below
    mixed = mixed[..., :-2] - 2 * mixed[..., 1:-1] + mixed[..., 2:]
    return mixed.abs().flatten(1).median(dim=1).values / (6 * 0.6745)


def _edge_step(density: torch.Tensor, reach: float) -> torch.Tensor:
    """Difference of the density across ``reach`` pixels to either side, from Sobel's gradient."""
    padded = torch.nn.functional.pad(density[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    smooth = torch.add(padded[:, :-2], padded[:, 1:-1], alpha=2).add_(padded[:, 2:])
    columns = smooth[..., 2:] - smooth[..., :-2]
    smooth = torch.add(padded[..., :-2], padded[..., 1:-1], alpha=2).add_(padded[..., 2:])
    rows = smooth[:, 2:] - smooth[:, :-2]
    return columns.mul_(columns).addcmul_(rows, rows).sqrt_().mul_(reach / 4.0)


def _steps_above(density: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """How many of its plane's levels each pixel lies above: uint8 (B, H, W)."""
    rise = (levels[1] - levels[0]).clamp_min(1e-6) if len(levels) > 1 else torch.ones_like(levels[0])
    steps = (density - levels[0][:, None, None]).div_(rise[:, None, None]).ceil_()
    return steps.clamp_(0, len(levels)).to(torch.uint8)


def pick_regions(density: torch.Tensor, levels: torch.Tensor, mpp: float, rules: RegionRules) -> torch.Tensor:
    """Pick the best non-overlapping regions of every plane.

    A region is a component above one level, and contains those above the next. What is summed over a region's pixels
    is therefore summed once, over the pixels that lie in no region above it, and then handed down the tree. A rim is
    such a sum too: a pixel enters the rim of its highest region and leaves it at the level where its lowest neighbour
    joins the region.

    Args:
        density: float32 (B, H, W) nuclear density.
        levels: float32 (L, B), evenly rising along the first axis: levels at which each plane is cut; L < 256.
        mpp: micrometres per pixel.
        rules: what counts as a nucleus.

    Returns:
        float32 (B, H, W): the level at which the region was cut that a pixel was picked in, infinite outside.
    """
    _, height, width = density.shape
    device = density.device
    steps = _steps_above(density, levels)
    bar = torch.full_like(density, float("inf")).flatten()
    inside = steps.flatten().nonzero().squeeze(1)
    if len(inside) == 0:
        return bar.view_as(density)
    labels = label_levels(steps, len(levels))
    top = steps.flatten()[inside].long()
    low = among_neighbours(steps, torch.minimum).flatten()[inside].long()
    owner = labels.of(top - 1, inside)
    n = labels.first[-1] + 1
    row = torch.div(inside, width, rounding_mode="floor").remainder_(height).double()
    column = inside.remainder(width).double()
    # Indices and no masks: each use of a mask would count its pixels anew. Elsewhere it would enter and leave at once.
    at_rim = (low < top).nonzero().squeeze(1)
    edge = _edge_step(density, rules.edge_reach / mpp).flatten()[inside[at_rim]].double()
    firm = (edge >= 0.5 * rules.min_contrast).double()
    enters, low, there = owner[at_rim], low[at_rim], inside[at_rim]
    also_below = (low > 0).nonzero().squeeze(1)
    leaves = labels.of(low[also_below] - 1, there[also_below])

    def grouped(at: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor:
        return grouped_sum(at, values, n)

    sums = [grouped(owner, v) for v in (None, row, column, row * row, column * column, row * column)]
    for values in (torch.ones_like(edge), edge, firm):
        sums.append(grouped(enters, values) - grouped(leaves, values[also_below]))
    total = torch.stack(sums, 1)
    # Any pixel of a region says which region below it lies in; one without pixels of its own asks those above it.
    some = torch.zeros(n, dtype=torch.long, device=device)
    some[owner] = inside
    parent = torch.zeros(n, dtype=torch.long, device=device)
    for level in range(len(levels) - 1, 0, -1):
        here = slice(labels.first[level] + 1, labels.first[level + 1] + 1)
        below = labels.of(level - 1, some[here])
        parent[here] = below
        total.index_add_(0, below, total[here].clone())
        some[below] = some[here].clone()
    plane = torch.div(some, height * width, rounding_mode="floor")
    floor = (rules.noise_factor * noise_levels(density)).clamp_min(rules.min_contrast)
    likeness = _likeness(total, floor[plane], mpp, rules)
    found = _best_cut(likeness, parent, labels.first, levels, plane)
    bar[inside] = found[owner]
    return bar.view_as(density)


def _likeness(total: torch.Tensor, floor: torch.Tensor, mpp: float, rules: RegionRules) -> torch.Tensor:
    """How much like a nucleus each region is, 0 where it cannot be one; see :class:`RegionRules`.

    Args:
        total: float64 (n, 9), over the pixels of each region: count, row, column, their squares and product, then over
            its rim: count, edge step, steps that are firm.
        floor: float32 (n,), the least contrast.
        mpp: micrometres per pixel.
        rules: what counts as a nucleus.

    Returns:
        float32 (n,); 0 for region 0, which stands for none.
    """
    area, length = total[:, 0].clamp_min(1), total[:, 6].clamp_min(1)
    mean_r, mean_c = total[:, 1] / area, total[:, 2] / area
    # A pixel is a square, not a point: 1/12 is its own variance.
    var_r, var_c = total[:, 3] / area - mean_r**2 + 1 / 12, total[:, 4] / area - mean_c**2 + 1 / 12
    root = (((var_r - var_c) / 2) ** 2 + (total[:, 5] / area - mean_r * mean_c) ** 2).sqrt()
    major, minor = (var_r + var_c) / 2 + root, ((var_r + var_c) / 2 - root).clamp_min(1e-9)
    contrast, support = total[:, 7] / length, total[:, 8] / length
    diameter = 2 * (area / torch.pi).sqrt() * mpp
    size = torch.minimum(
        (diameter - rules.min_diameter) / (rules.typical_diameter - rules.min_diameter),
        (rules.max_diameter - diameter) / (rules.max_diameter - rules.large_diameter),
    )
    roundness = area / (4 * torch.pi * (major * minor).sqrt())
    likeness = contrast * support * size.clamp(0, 1) * (roundness / 0.97) ** rules.roundness_power
    likeness = likeness * (rules.elongation_free * (minor / major).sqrt()).clamp_max(1) ** 2
    fit = (likeness >= rules.min_likeness) & (contrast >= floor)
    fit[:1].fill_(False)
    return torch.where(fit, likeness, 0.0).float()


def _best_cut(
    likeness: torch.Tensor, parent: torch.Tensor, first: list[int], levels: torch.Tensor, plane: torch.Tensor
) -> torch.Tensor:
    """As ``nuclei.regions._best_cut``: a region stays unless those inside it are better on the average.

    Returns:
        float32 (n,): the level of the picked region that each region lies in or is, infinite where there is none.
    """
    best = torch.zeros_like(likeness)
    ranges = [slice(first[level] + 1, first[level + 1] + 1) for level in range(len(levels))]
    for here, below in zip(ranges[::-1], [*ranges[-2::-1], None], strict=True):
        inherited = torch.maximum(likeness[here], best[here])
        if below is not None:
            offset, size = below.start, below.stop - below.start
            at = parent[here] - offset
            total = torch.zeros(size, device=likeness.device).index_add_(0, at, inherited)
            weight = torch.zeros(size, device=likeness.device).index_add_(0, at, (inherited > 0).float())
            best[below] = total / weight.clamp_min(1)
    found = torch.full_like(likeness, float("inf"))
    taken = (likeness > 0) & (likeness >= best)
    for level, here in enumerate(ranges):
        own = torch.where(taken[here], levels[level][plane[here]], float("inf"))
        found[here] = torch.where(found[parent[here]].isfinite(), found[parent[here]], own)
    return found
