"""Batched kernels of Nuclei-Centered Perturbation and of the views.

Every kernel takes float32 images (B, C, H, W) in [0, 1] with C = 3 (RGB) or 1 (grey) and one parameter a sample, works
on the images' device, has no loop over samples and, but for those that end in ``_``, never writes to its input. Those
that need space-filling random numbers take one integer seed a sample (see `cytossl_monai.transforms.kernels.random`).
All of them treat a sample as if it were alone: what a sample becomes does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cytossl_monai.transforms.kernels.chunks import per_sample
from cytossl_monai.transforms.kernels.device import to_device
from cytossl_monai.transforms.kernels.random import hash_noise, hash_uniform
from cytossl_monai.transforms.ncp.plate import (
    NuclearPixels,
    background_plate,
    glass_colour,
    keep_nuclei_,
    nuclear_weight,
    paint_over_,
)

__all__ = [
    "NuclearPixels",
    "add_noise",
    "background_plate",
    "cut_out",
    "fade",
    "glass_colour",
    "keep_nuclei_",
    "nuclear_weight",
    "paint_over_",
    "shuffle_patches",
    "swap_background",
]

_NOISE_STREAM, _SHUFFLE_STREAM, _CUTOUT_STREAM = 100, 300, 400


def add_noise(image: Tensor, std: Tensor, seeds: Tensor) -> Tensor:
    """White noise in every channel.

    Args:
        image: (B, C, H, W) float32 in [0, 1].
        std: (B,) standard deviation, as a part of the full range.
        seeds: (B,) int64.

    Returns:
        (B, C, H, W) float32 in [0, 1].
    """
    channels, height, width = image.shape[1:]
    field = hash_noise(seeds, _NOISE_STREAM, channels, height, width, image.device)
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
    batch, height, width = len(image), *image.shape[-2:]
    side = patch.to(device="cpu").round().to(torch.int64).clamp(1, max(1, min(height, width) // 2))
    count = (height // side) * (width // side)
    most = int(count.max())
    drawn = hash_uniform(seeds.cpu(), _SHUFFLE_STREAM, 2 * most).view(batch, most, 2)
    place = torch.arange(most, dtype=torch.float64).expand(batch, most)
    chosen = (drawn[..., 0] < fraction.to(device="cpu").unsqueeze(1)) & (place < count.unsqueeze(1))
    # The chosen patches come first: once in their own order (where to), once in random order (where from).
    to = torch.where(chosen, place / most, 2.0 + place).argsort(dim=1)
    origin = torch.where(chosen, drawn[..., 1], 2.0 + place).argsort(dim=1)
    moved = to_device(torch.empty_like(to).scatter_(1, to, origin), image.device)

    out = image.clone(memory_format=torch.contiguous_format)
    sizes = sorted(set(side.tolist()))
    for length in sizes:  # a loop over sizes, mostly few
        if len(sizes) == 1:
            _move_patches_(out, moved, length)
            break
        at = to_device((side == length).nonzero().squeeze(1), image.device)
        part = image.index_select(0, at)
        _move_patches_(part, moved.index_select(0, at), length)
        out.index_copy_(0, at, part)
    return out


def _move_patches_(image: Tensor, source: Tensor, length: int) -> None:
    """Replace each patch by another one, in place.

    Args:
        image: (n, C, H, W).
        source: (n, P) int64, for each patch, row after row, the patch that it becomes.
        length: side of a patch.
    """
    count, channels, height, width = image.shape
    rows, columns = height // length, width // length
    whole = image[..., : rows * length, : columns * length]
    cut = whole.unflatten(-1, (columns, length)).unflatten(2, (rows, length)).permute(0, 2, 4, 1, 3, 5)
    patches = cut.reshape(count * rows * columns, channels, length, length)
    first = torch.arange(0, len(patches), rows * columns, device=image.device).unsqueeze(1)
    taken = patches.index_select(0, (source[:, : rows * columns] + first).flatten())
    cut.copy_(taken.view(cut.shape))


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
    drawn = hash_uniform(seeds.cpu(), _CUTOUT_STREAM, 4 * count).view(batch, count, 4, 1)
    much = amount.to(device="cpu", dtype=torch.float64).view(-1, 1, 1)
    inside = []
    for axis, length in ((0, height), (1, width)):
        centre = drawn[:, :, axis] * length
        half = 0.5 * length * much * (0.5 + 0.5 * drawn[:, :, 2 + axis])
        inside.append((torch.arange(length, dtype=torch.float64) + 0.5 - centre).abs() <= half)
    rows, columns = to_device(torch.cat(inside, 2).to(torch.float32), image.device).split([height, width], 2)
    hits = torch.bmm(rows.transpose(1, 2), columns).unsqueeze(1)  # in how many rectangles a pixel lies
    return torch.where(hits > 0, colour, image)
