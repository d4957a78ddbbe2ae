"""Gaussian blur of a batch, a strength a sample."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cytossl_monai.transforms.kernels.device import to_device
from cytossl_monai.transforms.kernels.resampling import double, halve, shifted

__all__ = ["blur"]


def _smooth(image: Tensor, taps: Tensor) -> Tensor:
    """Convolve columns and rows with a symmetric kernel a sample: taps (B, radius + 1, 1, 1, 1), the border repeated.

    Sums of shifted copies and no call of a convolution: their bits must not depend on the size of the batch.
    """
    radius = taps.shape[1] - 1
    out = F.pad(image, (radius, radius, radius, radius), mode="replicate")
    middle, *beside = taps.unbind(1)
    for dim in (2, 3):
        copies = shifted(out, dim, image.shape[dim]).unbind()
        out = copies[radius] * middle
        for step, tap in enumerate(beside, 1):
            out.addcmul_(copies[radius - step] + copies[radius + step], tap)
    return out


def blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, a sigma a sample.

    Wide Gaussians are taken at half, quarter, ... resolution, where a few taps reach as far. Below one pixel, where
    half resolution alone would blur too much, the blurred image is mixed in by degrees.

    Args:
        image: (B, C, H, W) float32 in [0, 1].
        sigma: (B,) standard deviation in pixels, >= 0.

    Returns:
        (B, C, H, W) float32 in [0, 1].
    """
    sigma = sigma.to(device="cpu", dtype=torch.float32)
    depths = torch.floor(torch.log2(sigma.clamp_min(1e-6) / 0.75)).clamp_(1, 6).to(torch.int64)
    # Halving and doubling blur as well; their variances (boxes' and tents') are taken off the kernel's.
    left = sigma.square() - ((4**depths - 1).double() * (1.0 / 12.0 + 2.0 / 9.0)).to(torch.float32)
    scaled = (left.clamp_min(0.0).sqrt() / 2**depths).clamp_(0.3, 4.0)
    numbers = torch.cat([_taps(scaled), sigma.clamp(0.0, 1.0).square().unsqueeze(1)], 1)
    if len(kinds := sorted(set(depths.tolist()))) == 1:
        some = to_device(numbers, image.device).view(len(image), -1, 1, 1, 1)
        return _blur_at(image, some[:, :-1], some[:, -1], kinds[0])
    out = torch.empty_like(image)
    for depth in kinds:  # a loop over resolutions, at most six
        chosen = (depths == depth).nonzero().squeeze(1)
        radius = math.ceil(3.0 * float(scaled[chosen].max()))
        some = to_device(numbers[chosen], image.device).view(len(chosen), -1, 1, 1, 1)
        rows = to_device(chosen, image.device)
        out.index_copy_(0, rows, _blur_at(image.index_select(0, rows), some[:, : radius + 1], some[:, -1], depth))
    return out


def _taps(scaled: Tensor) -> Tensor:
    """Gaussian kernels of some sigmas, (n,): (n, radius + 1), from the middle outwards, for the widest's radius."""
    steps = torch.arange(math.ceil(3.0 * float(scaled.max())) + 1 if len(scaled) else 1)
    taps = torch.exp(-0.5 * (steps / scaled.unsqueeze(1)) ** 2)
    # Beyond its own three sigma a kernel is zero, however wide its neighbours' are.
    taps *= steps <= torch.ceil(3.0 * scaled.unsqueeze(1))
    return taps / (2.0 * taps.to(torch.float64).sum(1, keepdim=True).to(torch.float32) - taps[:, :1])


def _blur_at(image: Tensor, taps: Tensor, mix: Tensor, depth: int) -> Tensor:
    """:func:`blur`, all at one resolution: halved ``depth`` times.

    Args:
        image: (n, C, H, W).
        taps: (n, radius + 1, 1, 1, 1), the kernels of the halved image.
        mix: (n, 1, 1, 1), how much of the blurred image is taken.
        depth: how often it is halved.
    """
    pictures = [image]
    for _ in range(depth):
        pictures.append(halve(pictures[-1]))
    small = _smooth(pictures.pop(), taps)
    for larger in reversed(pictures):
        small = double(small, *larger.shape[-2:])
    return torch.lerp(image, small, mix).clamp_(0.0, 1.0)
