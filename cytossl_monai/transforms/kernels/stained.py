"""What is stained as a nucleus is, beside the glass and the other nuclei of its tile: red cells and crystals are not.

Density, size and shape alone take a red cell for a nucleus: it is as large, as round and as sharp. What tells them
apart in every stain tried is how much stain there is (a red cell on clear glass holds half of what a nucleus does), how
evenly it lies (precipitate is coarse), and which colour the tile's other nuclei have (crystals and soot are grey
among violet nuclei).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cytossl_monai.transforms.kernels.device import grouped_sum

__all__ = ["optical_density", "stained_regions"]

_CLEAR = 0.1
"""Optical density up to which the clearest part of a tile passes for glass; without glass nothing can lie on it."""
_ON_GLASS = 0.07
"""Density above the glass, in the densest channel, that the ring around a region may have to count as glass."""
_SMALL_UM2, _LARGE_UM2, _SMALL_EXTRA = 40.0, 60.0, 0.25
"""Square micrometres up to which a thing on glass must be stained by this share more, and from which it need not."""
_GREY = 0.03
"""Difference between the channels' densities, on the average of all regions, below which an image is grey."""


def optical_density(images: torch.Tensor, shape: tuple[int, int] | None = None) -> torch.Tensor:
    """Optical density of each channel, float32 (B, C, H, W), averaged down to ``shape``; NaN counts as clear glass."""
    if images.dtype == torch.uint8:
        values = images.float().div_(255.0)
    else:
        values = images.float().nan_to_num(1.0)
    if shape is not None and values.shape[-2:] != shape:
        values = F.interpolate(values, size=shape, mode="bilinear", antialias=True)
    return values.clamp_(1.0 / 255.0, 1.0).log10_().neg_()


def _grouped_mean(labels: torch.Tensor, inside: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of every channel over the pixels of each label: float64 (count + 1, C); NaN where a label has no pixel."""
    place = inside.nonzero(as_tuple=True)
    at = labels[place].long()
    picked = values.movedim(1, -1)[place].double()
    total = picked.new_zeros(count + 1, picked.shape[-1]).index_add_(0, at, picked)
    return total / grouped_sum(at, None, count + 1)[:, None]


def _grown(labels: torch.Tensor, radius: int) -> torch.Tensor:
    """Labels grown by ``radius`` pixels (a square); where two meet, the higher one."""
    side = 2 * radius + 1
    return F.max_pool2d(labels[:, None].double(), side, stride=1, padding=radius)[:, 0].long()


def stained_regions(
    labels: torch.Tensor, count: int, density: torch.Tensor, mpp: float, min_stain: float, min_colour: float
) -> torch.Tensor:
    """Which regions are stained as nuclei are.

    Args:
        labels: integers (B, H, W), 0 outside, 1 to ``count`` numbered through the batch.
        count: how many labels there are.
        density: float32 (B, 3, H, W), optical density in red, green and blue.
        mpp: micrometres per pixel.
        min_stain: least stain of what lies on glass, see ``RegionRules``; 0 asks for none.
        min_colour: least colour among violet nuclei, see ``RegionRules``; 0 asks for none.

    Returns:
        bool (count + 1,): True for what may be a nucleus, and for 0. Images of one channel, and grey ones, keep all.
    """
    keep = torch.ones(count + 1, dtype=torch.bool, device=labels.device)
    if not count or density.shape[1] != 3 or (min_stain <= 0 and min_colour <= 0):
        return keep
    mask = labels > 0
    glass = F.avg_pool2d(density, 4, ceil_mode=True, count_include_pad=False).flatten(2).amin(2)
    over = density - glass[:, :, None, None]
    # The outermost pixels of a region mix it with what is beside it.
    core = mask & (-F.max_pool2d(-mask[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0)
    place = mask.nonzero(as_tuple=True)
    owner = labels[place].long()
    area = grouped_sum(owner, None, count + 1)
    has_core = grouped_sum(owner, core[place].double(), count + 1) > 0
    core |= mask & ~has_core[labels.long()]
    means = _grouped_mean(labels, core, torch.cat([over, over[:, 1:2] ** 2], 1), count)
    stain = means[:, :3]
    spread = (means[:, 3] - stain[:, 1] ** 2).clamp_min(0).sqrt()
    near, far = _grown(labels, max(1, round(0.75 / mpp))), _grown(labels, max(2, round(2.5 / mpp)))
    ring = _grouped_mean(far, (near == 0) & (far > 0), over, count)
    red, green, blue = stain.unbind(1)
    colour = (green - blue) / green.clamp_min(1e-3)
    plane = torch.zeros(count + 1, dtype=torch.long, device=labels.device)
    plane[owner] = place[0]
    grey = ~((stain.amax(1) - stain.amin(1))[1:].mean() > _GREY)
    clear = (glass.amax(1) < _CLEAR)[plane]
    on_glass = clear & (ring.amax(1).nan_to_num(1.0) < _ON_GLASS)
    strength = (red + green - blue) / (1 + spread / green.clamp_min(1e-3))
    # A small thing on glass is more often a grain than a nucleus: it must be stained more.
    small = ((_LARGE_UM2 - area * mpp**2) / (_LARGE_UM2 - _SMALL_UM2)).clamp(0, 1)
    keep &= ~(on_glass & (strength < min_stain * (1 + _SMALL_EXTRA * small)))
    crystals = _grey_among_violet(colour, red / green.clamp_min(1e-3), area * keep, plane, len(labels), min_colour)
    return keep & ~crystals | grey


def _grey_among_violet(
    colour: torch.Tensor, hue: torch.Tensor, area: torch.Tensor, plane: torch.Tensor, planes: int, min_colour: float
) -> torch.Tensor:
    """Regions that absorb all light alike in a plane (one of ``planes``) whose nuclei, by area, are violet."""
    violet = area * ((colour > 0.45) & (hue < 0.8))
    share = [torch.zeros(planes, dtype=area.dtype, device=area.device) for _ in range(2)]
    for total, part in zip(share, (violet, area), strict=True):
        total.index_add_(0, plane[1:], part[1:])
    stained_violet = (share[0] > 0.5 * share[1])[plane]
    return stained_violet & (colour < min_colour) & (hue > 0.85)
