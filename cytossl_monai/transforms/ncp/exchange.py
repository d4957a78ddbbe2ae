"""Nuclei-Centered Perturbation as published: discs around some of the nuclei stay, pixels outside change places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cytossl_monai.transforms.kernels.chunks import chunks
from cytossl_monai.transforms.kernels.device import made_once, to_device
from cytossl_monai.transforms.kernels.random import hash_uniform, mix64
from cytossl_monai.transforms.nuclei.centres import NucleiCentres

__all__ = ["exchange_outside", "kept_discs", "retained_nuclei"]

_RETAIN_STREAM, _EXCHANGE_STREAM, _TAKE_PART_STREAM = 500, 600, 601


def retained_nuclei(nuclei: NucleiCentres, seeds: Tensor, prob: float) -> Tensor:
    """Which nuclei are retained: each with probability ``prob``, and at least one a tile that has any.

    Args:
        nuclei: of the batch.
        seeds: (B,) int64 on the CPU, one a tile.
        prob: in [0, 1]; 1 retains all, 0 a single one.

    Returns:
        (P,) bool on the CPU.
    """
    counts = nuclei.counts()
    most = int(counts.max()) if len(counts) else 0
    if prob >= 1.0 or most == 0:
        return torch.ones(len(nuclei.sample), dtype=torch.bool)
    drawn = hash_uniform(seeds, _RETAIN_STREAM, most)
    drawn = drawn.masked_fill(torch.arange(most) >= counts.unsqueeze(1), 2.0)
    place = torch.arange(len(nuclei.sample)) - nuclei.first()[nuclei.sample]
    own = drawn[nuclei.sample, place]
    return (own < prob) | (own == drawn.amin(1)[nuclei.sample])


def kept_discs(nuclei: NucleiCentres, retained: Tensor, radius: Tensor, height: int, width: int) -> Tensor:
    """The pixels that stay: those whose middle lies within a disc around a retained nucleus' centre.

    Where the nuclei's own pixels are known they stay too, should one be larger than its disc.

    Args:
        nuclei: of the batch.
        retained: (P,) bool on the CPU.
        radius: (B,) of the discs, in pixels, on the CPU.
        height: of the tiles.
        width: of the tiles.

    Returns:
        (B, 1, H, W) bool, on the device of ``nuclei.labels`` (else the CPU).
    """
    device = torch.device("cpu") if nuclei.labels is None else nuclei.labels.device
    xy, sample = nuclei.xy[retained], nuclei.sample[retained]
    reach = radius.double()[sample]
    tall = int(radius.max().ceil()) if len(radius) else 0
    # A disc is a run of pixels in every row: where runs begin is +1, where they have ended -1, and their sum tells.
    row = torch.floor(xy[:, 1:2]).long() + torch.arange(-tall - 1, tall + 2)
    half = reach.unsqueeze(1).square() - (row + 0.5 - xy[:, 1:2]).square()
    within = (half >= 0) & (row >= 0) & (row < height)
    half = half.clamp_min(0).sqrt()
    begin = torch.ceil(xy[:, 0:1] - half - 0.5).long().clamp(0, width)
    end = (torch.floor(xy[:, 0:1] + half - 0.5).long() + 1).clamp(0, width)
    within &= end > begin
    line = (sample.unsqueeze(1) * height + row)[within] * (width + 1)
    runs = torch.zeros(nuclei.batch * height * (width + 1), dtype=torch.int16, device=device)
    ones = torch.ones(len(line), dtype=torch.int16, device=device)
    runs.index_add_(0, to_device(line + begin[within], device), ones)
    runs.index_add_(0, to_device(line + end[within], device), -ones)
    kept = runs.view(nuclei.batch, 1, height, width + 1).cumsum(-1, dtype=torch.int16)[..., :width] > 0
    if nuclei.labels is not None:
        own = to_device(torch.cat([torch.zeros(1, dtype=torch.bool), retained]), device)
        kept |= own[nuclei.labels.long()].unsqueeze(1)
    return kept


def _scattered_order(seeds: Tensor, count: int, device: torch.device) -> Tensor:
    """For every seed a permutation of ``count`` numbers, (B, 2**k) int32; those from ``count`` on are to be left out.

    Rounds of multiplications by odd numbers and shifts, each of which maps the numbers below a power of two onto
    themselves: a permutation that costs no sorting, which for single pixels would cost more than all else.
    """
    bits = max(2, (count - 1).bit_length())
    low = (1 << bits) - 1
    half = (bits + 1) // 2
    # Products wrap around at 32 bits, which leaves the bits below as they are.
    keys = (mix64(seeds.unsqueeze(1) + _EXCHANGE_STREAM + torch.arange(8)) & low).int()
    keys[:, ::2] |= 1
    factors = to_device(keys, device).unsqueeze(2).unbind(1)
    x = _numbers(low + 1, device)
    for factor, summand in zip(factors[::2], factors[1::2], strict=True):
        x = torch.addcmul(summand, x, factor).bitwise_and_(low)
        x.bitwise_xor_(x >> half)
    return x


@made_once
def _numbers(count: int, device: torch.device) -> Tensor:
    """(count,) int32: 0, 1, 2, ..."""
    return torch.arange(count, device=device, dtype=torch.int32)


def exchange_outside(image: Tensor, kept: Tensor, block: Tensor, fraction: Tensor, seeds: Tensor) -> Tensor:
    """Let what lies outside change places with itself, in blocks; nothing that is kept takes part.

    The tile is laid out in blocks that are put on a round in random order. Every pixel outside takes the colour of the
    pixel in the same place of the next block on that round whose pixel there lies outside as well. So whole blocks
    move as wholes, a block that is kept in part changes the rest of its pixels, no colour is lost, none is doubled,
    and none comes from what is kept; with blocks of one pixel all pixels outside are strewn.

    Args:
        image: (B, C, H, W), of any dtype; not written to.
        kept: (B, 1, H, W) bool, True on what stays.
        block: (B,) side of a block in pixels, on the CPU; rounded, at least 1 and at most half the shorter side.
        fraction: (B,) part of the blocks that take part, in [0, 1].
        seeds: (B,) int64 on the CPU.

    Returns:
        A new tensor of the image's shape and dtype; bit-identical to it where ``kept``.
    """
    _, channels, height, width = image.shape
    side = block.cpu().double().round().long().clamp(1, max(1, min(height, width) // 2))
    out = torch.empty_like(image, memory_format=torch.contiguous_format)
    fraction, seeds = fraction.cpu(), seeds.cpu()
    sizes = sorted(set(side.tolist()))
    for length in sizes:  # a loop over sizes, mostly one
        rows = (side == length).nonzero().squeeze(1)
        at = to_device(rows, image.device)
        images, stays = (image, kept) if len(sizes) == 1 else (image.index_select(0, at), kept.index_select(0, at))
        for part in chunks(images):
            source = _sources(~stays[part, 0], length, fraction[rows[part]], seeds[rows[part]])
            source = source.unsqueeze(1).expand(-1, channels, -1)
            moved = images[part].flatten(2).gather(2, source).view(-1, channels, height, width)
            if len(moved) == len(image):
                return moved
            out.index_copy_(0, at[part], moved)
    return out


def _sources(outside: Tensor, length: int, fraction: Tensor, seeds: Tensor) -> Tensor:
    """From where each pixel takes its colour: (n, H * W) int64, positions in the flattened plane.

    Args:
        outside: (n, H, W) bool.
        length: side of a block.
        fraction: (n,) on the CPU.
        seeds: (n,) int64 on the CPU.
    """
    count, height, width = outside.shape
    device, plane = outside.device, height * width
    rows, columns = -(-height // length), -(-width // length)
    blocks = rows * columns
    order = _scattered_order(seeds, blocks, device)
    if bool((fraction < 1).any()):
        part = to_device(hash_uniform(seeds, _TAKE_PART_STREAM, blocks) < fraction.unsqueeze(1), device)
        part = part.view(count, rows, 1, columns, 1).expand(-1, -1, length, -1, length)
        outside = outside & part.reshape(count, rows * length, columns * length)[:, :height, :width]
    # Planes are laid out with so much room that every number in the order has a place, those to be left out as well.
    pitch = max(plane, order.shape[1])
    flags = F.pad(outside.flatten(1), (0, pitch - plane)).flatten()
    first = torch.arange(0, count * pitch, pitch, device=device).unsqueeze(1)
    if length == 1:
        position = order + first
        ring = flags[position]
    else:
        position, real = _block_pixels(order, length, height, width)
        position = position + first.view(-1, 1, 1, 1)
        ring = flags[position] & real
    source = torch.arange(pitch, device=device).repeat(count, 1)
    taking = position[ring]
    if len(taking):
        source.view(-1)[taking] = taking[_following(ring.flatten(0, -2), len(taking))].remainder(pitch)
    return source[:, :plane]


def _block_pixels(order: Tensor, length: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """For each offset in a block the pixels of all blocks in the order of the round.

    Args:
        order: (n, L) integers, the blocks of each plane; those beyond the last one are to be left out.
        length: side of a block.
        height: of the planes.
        width: of the planes.

    Returns:
        (n, length, length, L) int64, positions in the flattened plane; and which of them are real, bool.
    """
    rows, columns = -(-height // length), -(-width // length)
    real = order < rows * columns
    order = order.clamp(max=rows * columns - 1).long()
    top = torch.div(order, columns, rounding_mode="floor") * length
    left = order.remainder(columns) * length
    offset = torch.arange(length, device=order.device)
    y = top.view(len(order), 1, 1, -1) + offset.view(1, -1, 1, 1)
    x = left.view(len(order), 1, 1, -1) + offset.view(1, 1, -1, 1)
    inside_tile = (y < height) & (x < width) & real.view(len(order), 1, 1, -1)
    return y.clamp(max=height - 1) * width + x.clamp(max=width - 1), inside_tile


def _following(ring: Tensor, count: int) -> Tensor:
    """Which pixel comes next on the same round.

    Args:
        ring: (R, L) bool, which pixels are on their rounds, a round in every row.
        count: how many they are.

    Returns:
        (count,) int64: for each of them, row after row, the number of the one that comes next.
    """
    counts = ring.sum(1)
    end = counts.cumsum(0)
    following = torch.arange(1, count + 1, device=ring.device)
    # The last of each round is followed by its first. An empty round has none of both and must change nothing.
    first = torch.where(counts > 0, end - counts, count)
    return following.scatter_reduce_(0, (end - 1).clamp_min_(0), first, "amin")
