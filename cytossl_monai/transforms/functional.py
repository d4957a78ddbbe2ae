"""Batched kernels of Nuclei-Centered Perturbation and of the views.

Every kernel takes float32 images (B, C, H, W) in [0, 1] with C = 3 (RGB) or 1 (grey) and one parameter a sample, works
on the images' device, has no loop over samples and, but for ``keep_nuclei_``, never writes to its input. Those that
need space-filling random numbers take one integer seed a sample (see :mod:`cytossl_monai.transforms.ncp_random`). All
of them treat a sample as if it were alone: what a sample becomes does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import rgb_from_hed
from torch import Tensor

from cytossl_monai.transforms.ncp_plate import (
    NuclearPixels,
    background_plate,
    glass_colour,
    keep_nuclei_,
    nuclear_weight,
    per_sample,
)
from cytossl_monai.transforms.ncp_random import hash_noise, hash_uniform
from cytossl_monai.transforms.resampling import double, halve

__all__ = [
    "NuclearPixels",
    "add_noise",
    "background_plate",
    "blur",
    "cut_out",
    "fade",
    "glass_colour",
    "jitter_stain",
    "keep_nuclei_",
    "nuclear_weight",
    "shuffle_patches",
    "swap_background",
]

# Streams of the random numbers: one for each use, so that no two uses share numbers.
_NOISE_STREAM, _STAIN_STREAM, _SHUFFLE_STREAM, _CUTOUT_STREAM = 100, 200, 300, 400

_MIN_TRANSMISSION = 1.0 / 255.0  # optical density is taken of no less than one grey level


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
        rows = chosen.to(image.device)
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
    taps = taps.to(image.device)
    small = _smooth_axis(_smooth_axis(pictures.pop(), taps, 2), taps, 3)
    for larger in reversed(pictures):
        small = double(small, *larger.shape[-2:])
    mix = sigma.clamp(0.0, 1.0).square()
    return torch.lerp(image, small, per_sample(mix, image)).clamp_(0.0, 1.0)


def add_noise(image: Tensor, std: Tensor, seeds: Tensor) -> Tensor:
    """White noise in every channel.

    Args:
        image: (B, C, H, W) float32 in [0, 1].
        std: (B,) standard deviation, as a part of the full range.
        seeds: (B,) int64.

    Returns:
        (B, C, H, W) float32 in [0, 1].
    """
    field = hash_noise(seeds.to(image.device), _NOISE_STREAM, *image.shape[1:])
    return field.mul_(per_sample(std, image)).add_(image).clamp_(0.0, 1.0)


def fade(image: Tensor, amount: Tensor, colour: Tensor) -> Tensor:
    """Fade towards a colour, as cytoplasm that is washed out.

    Args:
        image: (B, C, H, W) float32 in [0, 1].
        amount: (B,) in [0, 1]: 0 leaves the image, 1 leaves the colour alone.
        colour: (B, C, 1, 1), as of :func:`glass_colour`.

    Returns:
        (B, C, H, W) float32 in [0, 1].
    """
    return torch.lerp(image, colour.expand_as(image), per_sample(amount, image))


@functools.cache
def _stains(channels: int) -> tuple[Tensor, Tensor]:
    """Stain vectors as rows and their inverse, float64 (channels, channels) on the CPU."""
    stains = (
        torch.from_numpy(np.array(rgb_from_hed, dtype=np.float64)) if channels == 3 else torch.eye(channels).double()
    )
    return stains, torch.linalg.inv(stains)


def jitter_stain(image: Tensor, amount: Tensor, seeds: Tensor, scale: float = 0.5, shift: float = 0.05) -> Tensor:
    """Vary the strength of each stain in optical density.

    RGB is unmixed into haematoxylin, eosin and DAB (Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 2001), each
    channel is scaled and shifted (Tellez et al., Medical Image Analysis 2019), and all is mixed again. The three
    vectors need not be the slide's stains: they span all colours. Grey images are scaled and shifted as they are.

    Args:
        image: (B, C, H, W) float32 in [0, 1], C = 3 or 1.
        amount: (B,) in [0, 1]: how much of ``scale`` and ``shift`` is used.
        seeds: (B,) int64.
        scale: a stain's density is multiplied by 1 - scale to 1 + scale.
        shift: then -shift to shift is added (in units of ln 10: an absorbance).

    Returns:
        (B, C, H, W) float32 in [0, 1].
    """
    channels = image.shape[1]
    drawn = hash_uniform(seeds.cpu(), _STAIN_STREAM, 2 * channels).mul_(2.0).sub_(1.0)
    drawn *= amount.to(device="cpu", dtype=torch.float64).unsqueeze(1)
    gains, shifts = 1.0 + scale * drawn[:, :channels], shift * math.log(10.0) * drawn[:, channels:]
    stains, inverse = _stains(channels)
    # Row vectors: density @ inverse = concentrations; (concentrations * gain + shift) @ stains = new density.
    matrix = (inverse * gains.unsqueeze(1)) @ stains
    matrix, bias = matrix.to(image.device, torch.float32), (shifts @ stains).to(image.device, torch.float32)
    log = image.clamp_min(_MIN_TRANSMISSION).log_()
    out = torch.empty_like(image, memory_format=torch.contiguous_format)
    # No matrix product: its bits depend on the size of the batch.
    for target in range(channels):
        mixed = out[:, target]
        torch.addcmul(-bias[:, target].view(-1, 1, 1), log[:, 0], matrix[:, 0, target].view(-1, 1, 1), out=mixed)
        for source in range(1, channels):
            mixed.addcmul_(log[:, source], matrix[:, source, target].view(-1, 1, 1))
    return out.exp_().clamp_(max=1.0)


def shuffle_patches(image: Tensor, patch: Tensor, fraction: Tensor, seeds: Tensor) -> Tensor:
    """Let square patches change places.

    Args:
        image: (B, C, H, W) float32.
        patch: (B,) side of a patch in pixels; what is left over at the right and lower border stays.
        fraction: (B,) part of the patches, in [0, 1], that change places with one another.
        seeds: (B,) int64.

    Returns:
        (B, C, H, W) float32.
    """
    batch, channels, height, width = image.shape
    side = patch.to(device="cpu").round().to(torch.int64).clamp(1, max(1, min(height, width) // 2))
    count = (height // side) * (width // side)
    most = int(count.max())
    drawn = hash_uniform(seeds.cpu(), _SHUFFLE_STREAM, 2 * most).view(batch, most, 2)
    place = torch.arange(most, dtype=torch.float64).expand(batch, most)
    chosen = (drawn[..., 0] < fraction.to(device="cpu").unsqueeze(1)) & (place < count.unsqueeze(1))
    # The chosen patches come first: once in their own order (where to), once in random order (where from).
    to = torch.where(chosen, place / most, 2.0 + place).argsort(dim=1)
    origin = torch.where(chosen, drawn[..., 1], 2.0 + place).argsort(dim=1)
    moved = torch.empty_like(to).scatter_(1, to, origin).to(image.device)

    out = image.clone(memory_format=torch.contiguous_format)
    for length in sorted(set(side.tolist())):  # a loop over sizes, mostly few
        where = (side == length).nonzero().squeeze(1)
        rows, columns = height // length, width // length
        at = where.to(image.device)
        part = image.index_select(0, at)
        whole = part[..., : rows * length, : columns * length]
        cut = whole.reshape(len(at), channels, rows, length, columns, length).permute(0, 2, 4, 1, 3, 5)
        patches = cut.reshape(len(at) * rows * columns, channels, length, length)
        first = torch.arange(len(at), device=image.device).unsqueeze(1) * (rows * columns)
        source = moved.index_select(0, at)[:, : rows * columns] + first
        taken = patches.index_select(0, source.flatten()).view(cut.shape).permute(0, 3, 1, 4, 2, 5)
        whole.copy_(taken.reshape(whole.shape))
        out.index_copy_(0, at, part)
    return out


def swap_background(image: Tensor, donor: Tensor, amount: Tensor) -> Tensor:
    """Put another tile's background in place of a tile's own.

    Args:
        image: (B, C, H, W) float32.
        donor: (B, C, H, W) float32, the backgrounds to take.
        amount: (B,) in [0, 1]: 1 takes the donor's alone.

    Returns:
        (B, C, H, W) float32.
    """
    return torch.lerp(image, donor, per_sample(amount, image))


def cut_out(image: Tensor, amount: Tensor, seeds: Tensor, colour: Tensor, count: int = 3) -> Tensor:
    """Replace rectangles by a colour (DeVries and Taylor, "Improved regularization ... with Cutout", 2017).

    Args:
        image: (B, C, H, W) float32.
        amount: (B,) longest side of a rectangle as a part of the image's side, in [0, 1].
        seeds: (B,) int64.
        colour: (B, C, 1, 1), as of :func:`glass_colour`.
        count: rectangles a sample.

    Returns:
        (B, C, H, W) float32.
    """
    batch, _, height, width = image.shape
    drawn = hash_uniform(seeds.cpu(), _CUTOUT_STREAM, 4 * count).view(batch, count, 4)
    inside = []
    for axis, length in ((0, height), (1, width)):
        centre = drawn[..., axis] * length
        half = (
            0.5
            * length
            * amount.to(device="cpu", dtype=torch.float64).unsqueeze(1)
            * (0.5 + 0.5 * drawn[..., 2 + axis])
        )
        at = torch.arange(length, dtype=torch.float64) + 0.5
        inside.append(((at - centre.unsqueeze(-1)).abs() <= half.unsqueeze(-1)).to(image.device))
    hit = torch.zeros(batch, 1, height, width, dtype=torch.bool, device=image.device)
    for rows, columns in zip(inside[0].unbind(1), inside[1].unbind(1), strict=True):
        hit |= rows.view(batch, 1, height, 1) & columns.view(batch, 1, 1, width)
    return torch.lerp(image, colour.expand_as(image), hit.to(torch.float32))
