"""The tile without its nuclei, on which perturbations work, and the way back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cytossl_monai.transforms.kernels.chunks import per_sample

__all__ = ["NuclearPixels", "background_plate", "glass_colour", "keep_nuclei_", "nuclear_weight"]

_MAX_MARGIN = 120  # pixels; squared distances are held in int16
_FAR = 15_000  # a squared distance beyond any margin: 120**2 = 14_400; plus 120**2 it still fits in int16
_SMALL_MARGIN = 11  # pixels up to which uint8 will do, which is faster
_SMALL_FAR = 125  # 11**2 = 121; plus 11**2 it still fits

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
    moved = torch.empty_like(squared)
    for dim in (2, 3):
        source, squared = squared, squared.clone()
        length = source.shape[dim]
        for step in range(1, min(radius, length - 1) + 1):
            torch.add(source, step * step, out=moved)
            kept = length - step
            ahead, behind = squared.narrow(dim, step, kept), squared.narrow(dim, 0, kept)
            torch.minimum(ahead, moved.narrow(dim, 0, kept), out=ahead)
            torch.minimum(behind, moved.narrow(dim, step, kept), out=behind)
    distance = squared.to(torch.float32).sqrt_()
    ramp = per_sample(feather, distance).clamp_min(1e-3)
    weight = distance.neg_().add_(per_sample(margin, distance) + ramp).div_(ramp).clamp_(0.0, 1.0)
    return weight.mul(weight).mul_(weight.mul_(-2.0).add_(3.0))  # smoothstep: no kink where the ramp ends


def _pool(x: Tensor, stride: int | tuple[int, int]) -> Tensor:
    """Means of blocks; the last block of a row or column may be smaller."""
    return F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)


@dataclass(frozen=True)
class NuclearPixels:
    """The pixels that are painted over and put back: few of a tile's, so both are done pixel by pixel.

    Attributes:
        at: (P,) int64, their positions in the flattened (B, 1, H, W) weight.
        there: (C, P) int64, the same in the flattened (B, C, H, W) images.
        weight: (P,) float32, more than 0.
    """

    at: Tensor
    there: Tensor
    weight: Tensor

    @classmethod
    def of(cls, weight: Tensor, channels: int) -> NuclearPixels:
        """Those of a weight, (B, 1, H, W) float32 as of :func:`nuclear_weight`."""
        plane = weight.shape[-2] * weight.shape[-1]
        flat = weight.flatten()
        at = flat.nonzero().squeeze(1)
        sample = torch.div(at, plane, rounding_mode="floor")
        channel = torch.arange(channels, device=at.device).unsqueeze(1)
        return cls(at, channel * plane + (at + sample * ((channels - 1) * plane)), flat[at])


def _enlarged_at(coarse: Tensor, at: Tensor, shape: torch.Size) -> Tensor:
    """What ``coarse``, enlarged bilinearly by ``_FILL_STRIDE``, has at the pixels ``at`` of (B, 1, H, W): (C, P)."""
    channels, height, width = shape[1:]
    rows, columns = coarse.shape[-2:]
    row = torch.div(at, width, rounding_mode="floor")
    column = at - row * width
    sample = torch.div(row, height, rounding_mode="floor")
    corners, shares = [], []
    for place, length, nodes in ((row - sample * height, height, rows), (column, width, columns)):
        node = ((torch.arange(length, device=at.device) + 0.5) / _FILL_STRIDE - 0.5).clamp_(0, nodes - 1)
        first = node.to(torch.int64)
        corners.append((first[place], (first + 1).clamp_(max=nodes - 1)[place]))
        shares.append((node - first)[place])
    flat = coarse.contiguous().flatten()
    base = torch.arange(channels, device=at.device).unsqueeze(1) * (rows * columns)
    base = base + sample * (channels * rows * columns)
    upper, lower = (base + at_row * columns for at_row in corners[0])
    left, right = corners[1]
    above = torch.lerp(flat[upper + left], flat[upper + right], shares[1])
    below = torch.lerp(flat[lower + left], flat[lower + right], shares[1])
    return torch.lerp(above, below, shares[0])


def background_plate(image: Tensor, weight: Tensor, pixels: NuclearPixels | None = None) -> Tensor:
    """The tile with its nuclei painted over by what lies around them.

    Perturbations work on this plate, not on the tile: a blurred nucleus would leave a dark halo beside the sharp one,
    and shuffled or swapped patches would strew pieces of nuclei about, which are the one thing that views must share.
    Filled by a pyramid (pull-push; Gortler et al., "The Lumigraph", SIGGRAPH 1996).

    Args:
        image: (B, C, H, W) float32 in [0, 1].
        weight: (B, 1, H, W) float32 in [0, 1], as of :func:`nuclear_weight`: 1 where the tile is painted over.
        pixels: those of the weight, where they are known already.

    Returns:
        (B, C, H, W) float32 in [0, 1].
    """
    keep = 1.0 - weight
    # Of means over 8 x 8 pixels, every second row tells as much.
    some = keep[..., ::2, :]
    stride = (_FILL_STRIDE // 2, _FILL_STRIDE)
    levels = [(_pool(image[..., ::2, :] * some, stride), _pool(some, stride))]
    while max(levels[-1][1].shape[-2:]) > 1:
        colour, known = levels[-1]
        levels.append((_pool(colour, 2), _pool(known, 2)))
    colour, known = levels.pop()
    mean = image.mean(dim=(2, 3), keepdim=True)  # a tile that is nuclei all over has nothing else to be filled with
    fill = torch.where(known > 1e-4, colour / known.clamp_min(1e-4), mean)
    for colour, known in reversed(levels):
        # So small that one call of PyTorch's own is faster than ``resampling.double``.
        coarse = F.interpolate(fill, scale_factor=2.0, mode="bilinear", align_corners=False)
        coarse = coarse[..., : known.shape[-2], : known.shape[-1]]
        trust = (known * 4.0).clamp_(0.0, 1.0)  # a node that sees a quarter of background stands for itself
        fill = torch.lerp(coarse, colour / known.clamp_min(1e-4), trust)
    out = image.clone(memory_format=torch.contiguous_format)
    pixels = NuclearPixels.of(weight, image.shape[1]) if pixels is None else pixels
    painted = _enlarged_at(fill, pixels.at, image.shape)
    flat = out.view(-1)
    flat[pixels.there] = torch.lerp(flat[pixels.there], painted, pixels.weight).clamp_(0.0, 1.0)
    return out


def keep_nuclei_(perturbed: Tensor, image: Tensor, pixels: NuclearPixels) -> Tensor:
    """Put the nuclei back, with their margins: ``weight * image + (1 - weight) * perturbed``.

    Args:
        perturbed: (B, C, H, W) float32 in [0, 1], contiguous; written to.
        image: (B, C, H, W) float32 in [0, 1].
        pixels: those that are nuclear or near to it, with their weights.

    Returns:
        ``perturbed``, bit-identical to ``image`` where the weight is 1.
    """
    flat = perturbed.view(-1)
    flat[pixels.there] = torch.lerp(flat[pixels.there], image.flatten()[pixels.there], pixels.weight)
    return perturbed


def glass_colour(image: Tensor) -> Tensor:
    """The colour of the empty slide: each channel's brightest block mean, and no darker than 0.75.

    Args:
        image: (B, C, H, W) float32 in [0, 1].

    Returns:
        (B, C, 1, 1) float32.
    """
    return _pool(image, _GLASS_STRIDE).amax(dim=(2, 3), keepdim=True).clamp_min(_GLASS_FLOOR)
