"""Nuclei masks for whole batches of tiles in plain PyTorch: the fast twin of ``nuclei.segment_instances``.

It picks regions by the same rules, at a coarser resolution and fewer levels, for all tiles at once on the device where
they lie; nothing loops over samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from cytossl_monai.transforms.kernels.chunks import chunks
from cytossl_monai.transforms.kernels.device import to_device
from cytossl_monai.transforms.kernels.stained import optical_density, stained_regions
from cytossl_monai.transforms.nuclei.batch import noise_levels, pick_regions
from cytossl_monai.transforms.nuclei.labels import label_planes
from cytossl_monai.transforms.nuclei.regions import RegionRules

__all__ = ["nuclear_density", "nuclei_mask"]

WORKING_MPP = 0.75
"""Micrometres per pixel at which regions are picked; finer tiles are shrunk to it, coarser ones left as they are."""
LEVELS = 12
"""Levels at which each tile is cut. Twice as many cost twice the time and change about one pixel of a nucleus in 50."""
DENSITY_RANGE = 1.3
"""Optical density above a tile's clearest glass beyond which no level is needed."""
_PIXELS_ON_CPU = 16 * 224 * 224  # at a time: twice what views take, as most is done at a coarser resolution


def nuclear_density(images: torch.Tensor) -> torch.Tensor:
    """Optical density that both red and green light meet: the darkness that only nuclei have.

    Haematoxylin, azure and the blue-black of Papanicolaou nuclei absorb red and green light alike. Blue-green cytoplasm
    lets green through, pink and orange cytoplasm and erythrocytes let red through. The lesser of both densities is
    therefore an upper bound on the amount of nuclear stain, whatever else lies in the same light path.

    Args:
        images: (..., 3 or 1, H, W), uint8 in [0, 255] or floating point in [0, 1].

    Returns:
        float32 (..., 1, H, W) in [0, 2.41]; NaN counts as clear glass.
    """
    brighter = images if images.shape[-3] == 1 else torch.maximum(images[..., :1, :, :], images[..., 1:2, :, :])
    if images.dtype == torch.uint8:
        return brighter.float().clamp_min_(1.0).div_(255.0).log10_().neg_()
    return brighter.float().nan_to_num(1.0).clamp_(1.0 / 255.0, 1.0).log10_().neg_()


def _least_around(values: torch.Tensor) -> torch.Tensor:
    """Least value among a pixel and its eight neighbours: (B, H, W) of any dtype."""
    for dim in (1, 2):
        source, values = values, values.clone()
        kept = source.shape[dim] - 1
        for here, there in ((0, 1), (1, 0)):
            part = values.narrow(dim, here, kept)
            torch.minimum(part, source.narrow(dim, there, kept), out=part)
    return values


def _segment(images: torch.Tensor, mpp: float, rules: RegionRules) -> torch.Tensor:
    """Mask of tiles that share one scale; arguments as in ``nuclei_mask``."""
    height, width = images.shape[-2:]
    density = nuclear_density(images)
    noisy = noise_levels(density[:, 0]) > rules.max_noise
    coarse, scale = density, mpp
    if mpp < 0.8 * WORKING_MPP:
        rows, columns = (max(1, round(n * mpp / WORKING_MPP)) for n in (height, width))
        coarse = F.interpolate(density, size=(rows, columns), mode="bilinear", antialias=True)
        scale = WORKING_MPP
    coarse = coarse[:, 0]
    # Each tile is cut at levels of its own, from just above its clearest glass to its darkest pixel. Glass is a mean:
    # noise makes single pixels clearer, and a level between them and the glass holds thousands of regions.
    glass = F.avg_pool2d(coarse[:, None], 4, ceil_mode=True, count_include_pad=False).flatten(1).amin(1)
    bottom = glass + 0.5 * rules.min_contrast
    top = torch.minimum(coarse.flatten(1).amax(1), bottom + DENSITY_RANGE)
    share = torch.arange(LEVELS, device=images.device, dtype=torch.float32)[:, None] / LEVELS
    bar = pick_regions(coarse, bottom + (top - bottom).clamp_min(0.0) * share, scale, rules)
    bar = bar.masked_fill(noisy[:, None, None], float("inf"))
    if images.shape[1] == 3 and (rules.min_stain > 0 or rules.min_colour > 0):
        labels, count = label_planes(bar.isfinite())
        colours = optical_density(images, (coarse.shape[-2], coarse.shape[-1]))
        stained = stained_regions(labels, count, colours, scale, rules.min_stain, rules.min_colour)
        bar = bar.masked_fill(~stained[labels.long()], float("inf"))
    if coarse.shape[-2:] == (height, width):
        return bar[:, None].isfinite()
    # The outline is drawn again at the tile's own resolution, at the level found, at most one coarse pixel further out.
    bar = F.interpolate(_least_around(bar)[:, None], size=(height, width), mode="nearest")
    radius = round(0.25 / mpp)
    if radius:
        density = F.avg_pool2d(density, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
    return density > bar


@torch.no_grad()
def nuclei_mask(
    images: torch.Tensor,
    mpp: float | Sequence[float] | torch.Tensor,
    *,
    min_contrast: float | None = None,
    rules: RegionRules | None = None,
) -> torch.Tensor:
    """Find the nuclei of a batch of tiles.

    Args:
        images: (B, 3 or 1, H, W), uint8 in [0, 255] or floating point in [0, 1], on any device.
        mpp: micrometres per pixel, one for all or (B,).
        min_contrast: step in optical density that a nucleus' edge must show at least; None takes that of ``rules``.
        rules: what counts as a nucleus, as for ``segment_instances``; None for the defaults.

    Returns:
        bool (B, 1, H, W) on the same device, True inside nuclei.

    Raises:
        ValueError: ``images`` is not (B, 3 or 1, H, W), or ``mpp`` is not positive or of another length.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (B, 3, H, W) or (B, 1, H, W), not {tuple(images.shape)}.")
    images = images.as_subclass(torch.Tensor)
    scales = torch.as_tensor(mpp, dtype=torch.float64).detach().cpu().reshape(-1)
    if scales.numel() not in (1, images.shape[0]):
        raise ValueError(f"mpp has {scales.numel()} values for {images.shape[0]} images; give one for all or one each.")
    if not bool((scales > 0).all() and torch.isfinite(scales).all()):
        raise ValueError(f"mpp is {scales.tolist()}; micrometres per pixel must be positive.")
    rules = rules or RegionRules()
    if min_contrast is not None:
        rules = replace(rules, min_contrast=min_contrast)
    distinct = torch.unique(scales)
    if len(distinct) <= 1:
        if images.numel() == 0:
            return torch.zeros_like(images[:, :1], dtype=torch.bool)
        parts = [_segment(images[rows], float(distinct[0]), rules) for rows in chunks(images, _PIXELS_ON_CPU)]
        return torch.cat(parts)
    result = torch.zeros_like(images[:, :1], dtype=torch.bool)
    for scale in distinct.tolist():  # over the distinct scales of a batch, mostly one or two, not over its samples
        rows = to_device((scales == scale).nonzero().flatten(), images.device)
        result[rows] = nuclei_mask(images[rows], scale, rules=rules)
    return result
