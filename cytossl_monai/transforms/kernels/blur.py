"""Gaussian blur of a batch, a strength a sample."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cytossl_monai.transforms.kernels.chunks import per_sample
from cytossl_monai.transforms.kernels.device import to_device
from cytossl_monai.transforms.kernels.resampling import double, halve

__all__ = ["blur"]


def _smooth_axis(x: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Convolve along ``dim`` with a symmetric kernel a sample: taps (B, radius + 1), the border repeated.

    A sum of shifted copies and no call of a convolution: its bits must not depend on the size of the batch.
    """
    radius = taps.shape[1] - 1
    pad = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
    padded = F.pad(x, pad, mode="replicate")
    length = x.shape[dim]
    out = x * per_sample(taps[:, 0], x)
    for step in range(1, radius + 1):
        pair = padded.narrow(dim, radius - step, length) + padded.narrow(dim, radius + step, length)
        out.addcmul_(pair, per_sample(taps[:, step], x))
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
    out = torch.empty_like(image)
    for depth in sorted(set(depths.tolist())):  # a loop over resolutions, at most six
        chosen = (depths == depth).nonzero().squeeze(1)
        if len(chosen) == len(image):
            return _blur_at(image, sigma, depth)
        rows = to_device(chosen, image.device)
        out.index_copy_(0, rows, _blur_at(image.index_select(0, rows), sigma[chosen], depth))
    return out


def _blur_at(image: Tensor, sigma: Tensor, depth: int) -> Tensor:
    """:func:`blur`, all at one resolution: halved ``depth`` times."""
    pictures = [image]
    for _ in range(depth):
        pictures.append(halve(pictures[-1]))
    # Halving and doubling blur as well; their variances (boxes' and tents') are taken off the kernel's.
    left = sigma.square() - (4**depth - 1) * (1.0 / 12.0 + 2.0 / 9.0)
    scaled = (left.clamp_min(0.0).sqrt() / 2**depth).clamp_(0.3, 4.0)
    radius = math.ceil(3.0 * float(scaled.max()))
    taps = torch.exp(-0.5 * (torch.arange(radius + 1) / scaled.unsqueeze(1)) ** 2)
    # Beyond its own three sigma a kernel is zero, however wide its neighbours' are.
    taps *= torch.arange(radius + 1) <= torch.ceil(3.0 * scaled.unsqueeze(1))
    taps /= 2.0 * taps.to(torch.float64).sum(1, keepdim=True).to(torch.float32) - taps[:, :1]
    taps = to_device(taps, image.device)
    small = _smooth_axis(_smooth_axis(pictures.pop(), taps, 2), taps, 3)
    for larger in reversed(pictures):
        small = double(small, *larger.shape[-2:])
    mix = sigma.clamp(0.0, 1.0).square()
    return torch.lerp(image, small, per_sample(mix, image)).clamp_(0.0, 1.0)
