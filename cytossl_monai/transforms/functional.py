"""Batched kernels of Nuclei-Centered Perturbation and of the views.

Every kernel takes float32 images (B, C, H, W) in [0, 1] with C = 3 (RGB) or 1 (grey) and one parameter a sample, works
on the images' device, has no loop over samples and never writes to its input. Those that need space-filling random
numbers take one integer seed a sample (see :mod:`cytossl_monai.transforms.ncp_random`). All of them treat a sample as
if it were alone: what a sample becomes does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import rgb_from_hed
from torch import Tensor

from cytossl_monai.transforms.ncp_random import hash_noise, hash_uniform

__all__ = [
    "add_noise",
    "background_plate",
    "blur",
    "cut_out",
    "fade",
    "glass_colour",
    "jitter_stain",
    "nuclear_weight",
    "shuffle_patches",
    "swap_background",
]

# Streams of the random numbers: one for each use, so that no two uses share numbers.
_NOISE_STREAM, _STAIN_STREAM, _SHUFFLE_STREAM, _CUTOUT_STREAM = 100, 200, 300, 400

_MAX_MARGIN = 120  # pixels; squared distances are held in int16
_FAR = 15_000  # a squared distance beyond any margin: 120**2 = 14_400; plus 120**2 it still fits in int16

_FILL_STRIDE = 8  # pixels between the nodes of the grid from which nuclei are filled with what lies around them
_GLASS_STRIDE = 16  # pixels a side of the blocks whose brightest is taken for glass
_GLASS_FLOOR = 0.75  # a tile that is cells all over shows no glass: what counts as glass is at least this bright
_MIN_TRANSMISSION = 1.0 / 255.0  # optical density is taken of no less than one grey level


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), float32 on the device of ``like``."""
    return values.to(device=like.device, dtype=torch.float32).view(-1, 1, 1, 1)


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
    squared = torch.full(mask.shape, _FAR, dtype=torch.int16, device=mask.device).masked_fill_(mask, 0)
    for dim in (2, 3):
        source, squared = squared, squared.clone()
        length = source.shape[dim]
        for step in range(1, min(radius, length - 1) + 1):
            moved = source + step * step
            kept = length - step
            ahead, behind = squared.narrow(dim, step, kept), squared.narrow(dim, 0, kept)
            torch.minimum(ahead, moved.narrow(dim, 0, kept), out=ahead)
            torch.minimum(behind, moved.narrow(dim, step, kept), out=behind)
    distance = squared.to(torch.float32).sqrt_()
    ramp = _column(feather, distance).clamp_min(1e-3)
    weight = distance.neg_().add_(_column(margin, distance) + ramp).div_(ramp).clamp_(0.0, 1.0)
    return weight.mul(weight).mul_(weight.mul_(-2.0).add_(3.0))  # smoothstep: no kink where the ramp ends


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
    height, width = image.shape[-2:]
    keep = 1.0 - weight
    levels = [(_pool(image * keep, _FILL_STRIDE), _pool(keep, _FILL_STRIDE))]
    while max(levels[-1][1].shape[-2:]) > 1:
        colour, known = levels[-1]
        levels.append((_pool(colour, 2), _pool(known, 2)))
    colour, known = levels.pop()
    mean = image.mean(dim=(2, 3), keepdim=True)  # a tile that is nuclei all over has nothing else to be filled with
    fill = torch.where(known > 1e-4, colour / known.clamp_min(1e-4), mean)
    for colour, known in reversed(levels):
        coarse = _resize(fill, known.shape[-2], known.shape[-1], 2)
        trust = (known * 4.0).clamp_(0.0, 1.0)  # a node that sees a quarter of background stands for itself
        fill = torch.lerp(coarse, colour / known.clamp_min(1e-4), trust)
    return torch.lerp(image, _resize(fill, height, width, _FILL_STRIDE), weight).clamp_(0.0, 1.0)


def _pool(x: Tensor, stride: int) -> Tensor:
    """Means of blocks; the last block of a row or column may be smaller."""
    return F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)


def _resize(x: Tensor, height: int, width: int, factor: int) -> Tensor:
    """Undo a pooling by ``factor``, bilinearly, to exactly (height, width)."""
    full = F.interpolate(x, (x.shape[-2] * factor, x.shape[-1] * factor), mode="bilinear", align_corners=False)
    return full[..., :height, :width]


def _smooth_axis(x: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Convolve along ``dim`` with a symmetric kernel a sample: taps (B, radius + 1), the border repeated.

    A sum of shifted copies and no call of a convolution: its bits must not depend on the size of the batch.
    """
    radius = taps.shape[1] - 1
    pad = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
    padded = F.pad(x, pad, mode="replicate")
    length = x.shape[dim]
    out = x * _column(taps[:, 0], x)
    for step in range(1, radius + 1):
        pair = padded.narrow(dim, radius - step, length) + padded.narrow(dim, radius + step, length)
        out.addcmul_(pair, _column(taps[:, step], x))
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
    height, width = image.shape[-2:]
    sigma = sigma.to(device="cpu", dtype=torch.float32)
    level = torch.floor(torch.log2(sigma.clamp_min(1e-6) / 0.75)).clamp_(1, 6).to(torch.int64)
    out = torch.empty_like(image)
    for depth in sorted(set(level.tolist())):  # a loop over resolutions, at most six
        chosen = (level == depth).nonzero().squeeze(1)
        rows = chosen.to(image.device)
        factor = 2**depth
        part = image.index_select(0, rows)
        pad_h, pad_w = -height % factor, -width % factor
        padded = F.pad(part, (0, pad_w, 0, pad_h), mode="replicate") if pad_h or pad_w else part
        small = F.avg_pool2d(padded, factor)
        # Pooling and enlarging blur as well; their variances (a box's and a tent's) are taken off the kernel's.
        left = sigma[chosen].square() - (factor**2 - 1) / 12.0 - factor**2 / 6.0
        scaled = (left.clamp_min(0.0).sqrt() / factor).clamp_(0.3, 4.0)
        radius = math.ceil(3.0 * float(scaled.max()))
        taps = torch.exp(-0.5 * (torch.arange(radius + 1) / scaled.unsqueeze(1)) ** 2)
        # Beyond its own three sigma a kernel is zero, however wide its neighbours' are.
        taps *= torch.arange(radius + 1) <= torch.ceil(3.0 * scaled.unsqueeze(1))
        taps /= 2.0 * taps.to(torch.float64).sum(1, keepdim=True).to(torch.float32) - taps[:, :1]
        taps = taps.to(image.device)
        small = _smooth_axis(_smooth_axis(small, taps, 2), taps, 3)
        mix = sigma[chosen].clamp(0.0, 1.0).square()
        out[rows] = torch.lerp(part, _resize(small, height, width, factor), _column(mix, image))
    return out.clamp_(0.0, 1.0)


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
    return field.mul_(_column(std, image)).add_(image).clamp_(0.0, 1.0)


def glass_colour(image: Tensor) -> Tensor:
    """The colour of the empty slide: each channel's brightest block mean, and no darker than 0.75.

    Args:
        image: (B, C, H, W) float32 in [0, 1].

    Returns:
        (B, C, 1, 1) float32.
    """
    return _pool(image, _GLASS_STRIDE).amax(dim=(2, 3), keepdim=True).clamp_min(_GLASS_FLOOR)


def fade(image: Tensor, amount: Tensor, colour: Tensor) -> Tensor:
    """Fade towards a colour, as cytoplasm that is washed out.

    Args:
        image: (B, C, H, W) float32 in [0, 1].
        amount: (B,) in [0, 1]: 0 leaves the image, 1 leaves the colour alone.
        colour: (B, C, 1, 1), as of :func:`glass_colour`.

    Returns:
        (B, C, H, W) float32 in [0, 1].
    """
    return torch.lerp(image, colour.expand_as(image), _column(amount, image))


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
    stains = (
        torch.from_numpy(np.array(rgb_from_hed, dtype=np.float64)) if channels == 3 else torch.eye(channels).double()
    )
    # Row vectors: density @ inverse = concentrations; (concentrations * gain + shift) @ stains = new density.
    matrix = (torch.linalg.inv(stains) * gains.unsqueeze(1)) @ stains
    matrix, bias = matrix.to(image.device, torch.float32), (shifts @ stains).to(image.device, torch.float32)
    density = image.clamp_min(_MIN_TRANSMISSION).log_().neg_()
    out = torch.empty_like(image)
    for target in range(channels):
        mixed = torch.add(_column(bias[:, target], image)[:, 0], 0.0).expand(image.shape[0], *image.shape[2:]).clone()
        for source in range(channels):
            mixed.addcmul_(density[:, source], matrix[:, source, target].view(-1, 1, 1))
        out[:, target] = mixed
    return out.neg_().exp_().clamp_(0.0, 1.0)


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
    columns, count = width // side, (height // side) * (width // side)
    most = int(count.max())
    drawn = hash_uniform(seeds.cpu(), _SHUFFLE_STREAM, 2 * most).view(batch, most, 2)
    place = torch.arange(most, dtype=torch.float64).expand(batch, most)
    chosen = (drawn[..., 0] < fraction.to(device="cpu").unsqueeze(1)) & (place < count.unsqueeze(1))
    # The chosen patches come first: once in their own order (where to), once in random order (where from).
    to = torch.where(chosen, place / most, 2.0 + place).argsort(dim=1)
    origin = torch.where(chosen, drawn[..., 1], 2.0 + place).argsort(dim=1)
    moved = torch.empty_like(to).scatter_(1, to, origin).to(image.device)

    side, columns, rows = (v.to(image.device).view(-1, 1, 1) for v in (side, columns, height // side))
    y = torch.arange(height, device=image.device).view(1, -1, 1)
    x = torch.arange(width, device=image.device).view(1, 1, -1)
    patch_y, patch_x = y // side, x // side
    whole = (patch_y < rows) & (patch_x < columns)
    own = torch.where(whole, patch_y * columns + patch_x, 0)
    source = moved.gather(1, own.view(batch, -1)).view(batch, height, width)
    source_y, source_x = (source // columns) * side + y % side, (source % columns) * side + x % side
    index = torch.where(whole, source_y * width + source_x, y * width + x).view(batch, 1, -1)
    return image.reshape(batch, channels, -1).gather(2, index.expand(-1, channels, -1)).view_as(image)


def swap_background(image: Tensor, donor: Tensor, amount: Tensor) -> Tensor:
    """Put another tile's background in place of a tile's own.

    Args:
        image: (B, C, H, W) float32.
        donor: (B, C, H, W) float32, the backgrounds to take.
        amount: (B,) in [0, 1]: 1 takes the donor's alone.

    Returns:
        (B, C, H, W) float32.
    """
    return torch.lerp(image, donor, _column(amount, image))


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
    hit = (inside[0].unsqueeze(-1) & inside[1].unsqueeze(-2)).any(dim=1, keepdim=True)
    return torch.where(hit, colour, image)
