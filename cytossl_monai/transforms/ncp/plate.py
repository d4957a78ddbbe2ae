"""The tile without its nuclei, on which perturbations work, and the way back."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cytossl_monai.transforms.kernels.device import made_once, to_device
from cytossl_monai.transforms.kernels.resampling import shifted

__all__ = ["NuclearPixels", "background_plate", "glass_colour", "keep_nuclei_", "nuclear_weight", "paint_over_"]

_MAX_MARGIN = 120  # pixels; squared distances are held in int16
_FAR = 15_000  # a squared distance beyond any margin: 120**2 = 14_400; plus 120**2 it still fits in int16
_SMALL_MARGIN = 11  # pixels up to which uint8 will do, which is faster
_SMALL_FAR = 125  # 11**2 = 121; plus 11**2 it still fits
_SHIFTS = 2 * _SMALL_MARGIN + 1  # copies of the mask at a time

_FILL_STRIDE = 8  # pixels between the nodes of the grid from which nuclei are filled with what lies around them
_GLASS_STRIDE = 16  # pixels a side of the blocks whose brightest is taken for glass
_GLASS_FLOOR = 0.75  # a tile that is cells all over shows no glass: what counts as glass is at least this bright


def nuclear_weight(mask: Tensor, margin: Tensor, feather: Tensor) -> Tensor:
    """How much of the original a pixel keeps: 1 on nuclei and in their margin, then down to 0 along a smooth ramp.

    The distance to the nearest nuclear pixel is the exact Euclidean one, found by two passes of a separable lower
    envelope that looks no further than the margin reaches (Felzenszwalb and Huttenlocher, Theory of Computing 2012).

    Args:
        mask: (B, 1, H, W) bool, True on nuclei.
        margin: (B,) pixels around a nucleus that are kept whole, >= 0.
        feather: (B,) pixels over which the weight falls from 1 to 0 after that, >= 0.

    Returns:
        (B, 1, H, W) float32 in [0, 1]. A sample without nuclei is 0 everywhere.

    Raises:
        ValueError: if margin and feather together reach further than 120 pixels.
    """
    reach = float((margin + feather).max()) if len(margin) else 0.0
    radius = math.ceil(reach)
    if radius > _MAX_MARGIN:
        raise ValueError(
            f"margin_um + feather_um reach {reach:.0f} pixels; at most {_MAX_MARGIN} are allowed: "
            "lower them or give the right mpp"
        )
    dtype, far = (torch.uint8, _SMALL_FAR) if radius <= _SMALL_MARGIN else (torch.int16, _FAR)
    squared = (~mask).to(dtype).mul_(far)
    for dim in (2, 3):
        squared = _lower_envelope(squared, dim, radius, far)
    ramp = feather.to(torch.float32).clamp_min(1e-3)
    end = margin.to(torch.float32) + ramp
    end, ramp = to_device(torch.stack([end, ramp]), mask.device).view(2, -1, 1, 1, 1).unbind()
    weight = (end - squared.sqrt()).div_(ramp).clamp_(0.0, 1.0)
    return (weight * weight).mul_(torch.rsub(weight, 3.0, alpha=2.0))  # smoothstep: no kink where the ramp ends


def _lower_envelope(values: Tensor, dim: int, radius: int, far: int) -> Tensor:
    """Least of ``values + distance**2`` along ``dim``, up to ``radius`` pixels away: the same shape and dtype."""
    radius = min(radius, values.shape[dim] - 1)
    if radius < 1:
        return values
    padded = F.pad(values, (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0), value=far)
    copies = shifted(padded, dim, values.shape[dim])
    if values.device.type == "cpu":  # where ``amin`` takes integers one by one
        least = values.clone()
        for step in range(1, radius + 1):
            nearer = torch.minimum(copies[radius - step], copies[radius + step]).add_(step * step)
            torch.minimum(least, nearer, out=least)
        return least
    squares = _squares(radius, values.dtype, values.device)
    blocks = [slice(first, first + _SHIFTS) for first in range(0, 2 * radius + 1, _SHIFTS)]
    return functools.reduce(torch.minimum, [(copies[some] + squares[some]).amin(0) for some in blocks])


@made_once
def _squares(radius: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2 radius + 1, 1, 1, 1, 1): squares of the whole numbers from -radius to radius."""
    return torch.arange(-radius, radius + 1, device=device).square().to(dtype).view(-1, 1, 1, 1, 1)


def _pool(x: Tensor, stride: int | tuple[int, int]) -> Tensor:
    """Means of blocks; the last block of a row or column may be smaller."""
    return F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)


@dataclass(frozen=True)
class NuclearPixels:
    """The pixels that are painted over and put back: few of a tile's, so both are done pixel by pixel.

    Attributes:
        sample: (P,) int64, which sample of the batch each lies in.
        place: (P,) int64, its position in the flattened (H, W) plane.
        there: (C, P) int64, its positions in the flattened (B, C, H, W) images.
        weight: (P,) float32, more than 0.
    """

    sample: Tensor
    place: Tensor
    there: Tensor
    weight: Tensor

    @classmethod
    def of(cls, weight: Tensor, channels: int) -> NuclearPixels:
        """Those of a weight, (B, 1, H, W) float32 as of :func:`nuclear_weight`."""
        plane = weight.shape[-2] * weight.shape[-1]
        flat = weight.flatten()
        at = flat.nonzero().squeeze(1)
        sample = torch.div(at, plane, rounding_mode="floor")
        first = torch.add(at, sample, alpha=(channels - 1) * plane)
        there = first + _steps(channels, plane, at.device)
        return cls(sample, torch.sub(at, sample, alpha=plane), there, flat[at])


@made_once
def _steps(count: int, size: int, device: torch.device) -> Tensor:
    """(count, 1) int64: multiples of ``size``, from 0 on."""
    return torch.arange(count, device=device).mul_(size).unsqueeze(1)


@made_once
def _corners(height: int, width: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Between which nodes of a coarse grid the pixels of a plane lie.

    Args:
        height: of the plane.
        width: of the plane.
        rows: of the grid, whose nodes are ``_FILL_STRIDE`` pixels apart.
        columns: of the grid.
        device: where the tensors are needed.

    Returns:
        (4, height * width) int64, positions in the flattened grid of the nodes to the upper left, upper right, lower
        left and lower right; and (2, height * width) float32, how near a pixel is to the right and to the lower ones.
    """
    firsts, nexts, shares = [], [], []
    for length, nodes in ((height, rows), (width, columns)):
        node = ((torch.arange(length, device=device) + 0.5) / _FILL_STRIDE - 0.5).clamp_(0, nodes - 1)
        first = node.to(torch.int64)
        firsts.append(first)
        nexts.append((first + 1).clamp_(max=nodes - 1))
        shares.append(node - first)
    corners = [row.unsqueeze(1) * columns + column for row in (firsts[0], nexts[0]) for column in (firsts[1], nexts[1])]
    beside, below = torch.broadcast_tensors(shares[1].unsqueeze(0), shares[0].unsqueeze(1))
    return torch.stack(corners).flatten(1), torch.stack([beside, below]).flatten(1)


def _enlarged_at(coarse: Tensor, pixels: NuclearPixels, height: int, width: int) -> Tensor:
    """What ``coarse`` (B, C, h, w), enlarged bilinearly by ``_FILL_STRIDE``, has at some pixels of (H, W): (C, P)."""
    channels, rows, columns = coarse.shape[1:]
    size = rows * columns
    corners, shares = _corners(height, width, rows, columns, coarse.device)
    first = torch.add(_steps(channels, size, coarse.device), pixels.sample, alpha=channels * size)
    nodes = coarse.flatten()[first.unsqueeze(1) + corners[:, pixels.place]]
    beside, below = shares[:, pixels.place]
    upper, lower = torch.lerp(nodes[:, ::2], nodes[:, 1::2], beside).unbind(1)
    return torch.lerp(upper, lower, below)


def background_plate(image: Tensor, weight: Tensor) -> Tensor:
    """The tile with its nuclei painted over by what lies around them.

    Perturbations work on this plate, not on the tile: a blurred nucleus would leave a dark halo beside the sharp one,
    and shuffled or swapped patches would strew pieces of nuclei about, which are the one thing that views must share.
    Filled by a pyramid (pull-push; Gortler et al., "The Lumigraph", SIGGRAPH 1996).

    Args:
        image: (B, C, H, W) float32 in [0, 1].
        weight: (B, 1, H, W) float32 in [0, 1], as of :func:`nuclear_weight`: 1 where the tile is painted over.

    Returns:
        (B, C, H, W) float32 in [0, 1].
    """
    out = image.clone(memory_format=torch.contiguous_format)
    paint_over_(out, weight, NuclearPixels.of(weight, image.shape[1]))
    return out


def paint_over_(image: Tensor, weight: Tensor, pixels: NuclearPixels) -> Tensor:
    """:func:`background_plate` in place.

    Args:
        image: (B, C, H, W) float32 in [0, 1], contiguous; written to.
        weight: (B, 1, H, W) float32 in [0, 1].
        pixels: those of the weight.

    Returns:
        (C, P) float32: what was at these pixels, for :func:`keep_nuclei_`.
    """
    fill = _filled(image, weight)
    painted = _enlarged_at(fill, pixels, *image.shape[-2:])
    flat = image.view(-1)
    own = flat[pixels.there]
    flat[pixels.there] = torch.lerp(own, painted, pixels.weight).clamp_(0.0, 1.0)
    return own


def _filled(image: Tensor, weight: Tensor) -> Tensor:
    """Colours around nuclei on a coarse grid, a node each ``_FILL_STRIDE`` pixels: (B, C, h, w) float32."""
    batch, channels = image.shape[:2]
    # Of means over 8 x 8 pixels, every second row tells as much. The last channel is how much of a pixel is known.
    known = 1.0 - weight[..., ::2, :]
    level = torch.empty(batch, channels + 1, *known.shape[-2:], device=image.device)
    torch.mul(image[..., ::2, :], known, out=level[:, :channels])
    level[:, channels:] = known
    level = _pool(level, (_FILL_STRIDE // 2, _FILL_STRIDE))
    levels = [level]
    while max(level.shape[-2:]) > 1:
        level = _pool(level, 2)
        levels.append(level)
    # What is done to each node by itself is done to those of all levels at once.
    nodes = torch.cat([level.flatten(2) for level in levels], 2)
    known = nodes[:, channels:]
    colour = nodes[:, :channels] / known.clamp_min(1e-4)
    trust = (known * 4.0).clamp_(0.0, 1.0)  # a node that sees a quarter of background stands for itself
    sizes = [level.shape[-2:] for level in levels]
    counts = [size.numel() for size in sizes]
    parts = zip(colour.split(counts, 2), trust.split(counts, 2), sizes, strict=True)
    *finer, (top, _, _) = ((c.unflatten(2, size), t.unflatten(2, size), size) for c, t, size in parts)
    mean = image.mean(dim=(2, 3), keepdim=True)  # a tile that is nuclei all over has nothing else to be filled with
    fill = torch.where(known[..., -1:].unsqueeze(-1) > 1e-4, top, mean)
    for colour, trust, (rows, columns) in reversed(finer):
        # So small that one call of PyTorch's own is faster than ``resampling.double``.
        coarse = F.interpolate(fill, scale_factor=2.0, mode="bilinear", align_corners=False)
        fill = torch.lerp(coarse[..., :rows, :columns], colour, trust)
    return fill


def keep_nuclei_(perturbed: Tensor, own: Tensor, pixels: NuclearPixels) -> Tensor:
    """Put the nuclei back, with their margins: ``weight * image + (1 - weight) * perturbed``.

    Args:
        perturbed: (B, C, H, W) float32 in [0, 1], contiguous; written to.
        own: (C, P) float32, what the image had at these pixels, as of :func:`paint_over_`.
        pixels: those that are nuclear or near to it, with their weights.

    Returns:
        ``perturbed``, bit-identical to the image where the weight is 1.
    """
    flat = perturbed.view(-1)
    flat[pixels.there] = torch.lerp(flat[pixels.there], own, pixels.weight)
    return perturbed


def glass_colour(image: Tensor) -> Tensor:
    """The colour of the empty slide: each channel's brightest block mean, and no darker than 0.75.

    Args:
        image: (B, C, H, W) float32 in [0, 1].

    Returns:
        (B, C, 1, 1) float32.
    """
    return _pool(image, _GLASS_STRIDE).amax(dim=(2, 3), keepdim=True).clamp_min(_GLASS_FLOOR)
