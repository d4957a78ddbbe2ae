"""Nuclei masks for whole batches of tiles in plain PyTorch: the fast twin of ``nuclei.segment_instances``.

Everything is pooling and comparison on the whole batch, on the device where the batch lies; nothing loops over samples
and no connected components are formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ["nuclear_density", "nuclei_mask"]

WORKING_MPP = 1.0
"""Micrometres per pixel at which backgrounds and peaks are taken; edges are drawn at the tile's own resolution."""


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
    brighter = images.amax(dim=-3, keepdim=True) if images.shape[-3] == 1 else images[..., :2, :, :].amax(-3, True)
    if images.dtype == torch.uint8:
        table = -(torch.arange(256, device=images.device, dtype=torch.float32).clamp_min(1.0) / 255.0).log10()
        return table[brighter.int()]
    return -(brighter.float().nan_to_num(1.0).clamp(1.0 / 255.0, 1.0)).log10()


def _max_pool(x: torch.Tensor, radius: int) -> torch.Tensor:
    """Grey dilation by a square of side ``2 * radius + 1``, rows and columns apart."""
    if radius < 1:
        return x
    side = 2 * radius + 1
    x = F.max_pool2d(x, (side, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(x, (1, side), stride=1, padding=(0, radius))


def _min_pool(x: torch.Tensor, radius: int) -> torch.Tensor:
    """Grey erosion by the same square."""
    return -_max_pool(-x, radius)


def _mean_pool(x: torch.Tensor, radius: int) -> torch.Tensor:
    """Mean over the same square; at the border over what lies inside."""
    if radius < 1:
        return x
    return F.avg_pool2d(x, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)


def _segment(images: torch.Tensor, mpp: float, min_contrast: float) -> torch.Tensor:
    """Mask of tiles that share one scale; arguments as in ``nuclei_mask``."""
    height, width = images.shape[-2:]
    density = nuclear_density(images)
    factor = min(max(1, round(WORKING_MPP / mpp)), height, width)
    coarse = F.avg_pool2d(density, factor, ceil_mode=True, count_include_pad=False) if factor > 1 else density
    scale = mpp * factor

    def pixels(micrometres: float) -> int:
        return max(1, round(micrometres / scale))

    # Opening: what is left of the density once everything narrower than the widest nucleus is taken away.
    background = _mean_pool(_max_pool(_min_pool(coarse, pixels(11.0)), pixels(11.0)), pixels(4.0))
    background = torch.minimum(background, coarse)
    height_above = _mean_pool(coarse - background, 1 if scale < 1.5 else 0)
    peak = _mean_pool(_max_pool(height_above, pixels(4.0)), pixels(2.0))
    # Each nucleus is cut at half its own height above its surroundings, where its edge is steepest.
    bar = background + (0.5 * peak).clamp_min(0.5 * min_contrast)
    bar = torch.where(peak < min_contrast, torch.full_like(bar, float("inf")), bar)
    core = coarse > bar
    # Threads and specks do not survive an erosion of a micrometre; what does grows back within the mask.
    kept = _max_pool(_min_pool(core.float(), pixels(1.2)), pixels(2.4)) > 0
    bar = torch.where(kept, bar, torch.full_like(bar, 9.0)).clamp_max(9.0)
    if factor > 1:
        bar = F.interpolate(bar, scale_factor=factor, mode="nearest")[..., :height, :width]
        density = _mean_pool(density, max(0, round(0.4 / mpp)))
    return density > bar


@torch.no_grad()
def nuclei_mask(
    images: torch.Tensor, mpp: float | Sequence[float] | torch.Tensor, *, min_contrast: float = 0.12
) -> torch.Tensor:
    """Find the nuclei of a batch of tiles.

    Args:
        images: (B, 3 or 1, H, W), uint8 in [0, 255] or floating point in [0, 1], on any device.
        mpp: micrometres per pixel, one for all or (B,).
        min_contrast: optical density by which a nucleus must exceed its surroundings.

    Returns:
        bool (B, 1, H, W) on the same device, True inside nuclei.

    Raises:
        ValueError: ``images`` is not (B, 3 or 1, H, W), or ``mpp`` is not positive or of another length.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (B, 3, H, W) or (B, 1, H, W), not {tuple(images.shape)}.")
    scales = torch.as_tensor(mpp, dtype=torch.float64).detach().cpu().reshape(-1)
    if scales.numel() not in (1, images.shape[0]):
        raise ValueError(f"mpp has {scales.numel()} values for {images.shape[0]} images; give one for all or one each.")
    if not bool((scales > 0).all() and torch.isfinite(scales).all()):
        raise ValueError(f"mpp is {scales.tolist()}; micrometres per pixel must be positive.")
    distinct = torch.unique(scales)
    if len(distinct) <= 1:
        if images.numel() == 0:
            return torch.zeros_like(images[:, :1], dtype=torch.bool)
        return _segment(images, float(distinct[0]), min_contrast)
    result = torch.zeros_like(images[:, :1], dtype=torch.bool)
    for scale in distinct.tolist():  # over the distinct scales of a batch, mostly one or two, not over its samples
        rows = (scales == scale).nonzero().flatten().to(images.device)
        result[rows] = _segment(images[rows], scale, min_contrast)
    return result
