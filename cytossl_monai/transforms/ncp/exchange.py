"""Nuclei-Centered Perturbation as published: discs around some of the nuclei stay, pixels outside change places."""

from __future__ import annotations

import torch
from torch import Tensor

from cytossl_monai.transforms.kernels.chunks import chunks
from cytossl_monai.transforms.kernels.device import to_device
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


def _scattered_order(seeds: Tensor, count: int) -> Tensor:
    """For every seed a permutation of ``count`` numbers, (B, 2**k) int32; those from ``count`` on are to be left out.

    Rounds of multiplications by odd numbers and shifts, each of which maps the numbers below a power of two onto
    themselves: a permutation that costs no sorting, which for single pixels would cost more than all else.
    """
    bits = max(2, (count - 1).bit_length())
    low = (1 << bits) - 1
    half = (bits + 1) // 2
    # Products wrap around at 32 bits, which leaves the bits below as they are.
    keys = (mix64(seeds.unsqueeze(1) + _EXCHANGE_STREAM + torch.arange(8, device=seeds.device)) & low).int()
    x = torch.arange(low + 1, device=seeds.device, dtype=torch.int32).expand(len(seeds), -1).contiguous()
    for turn in range(4):
        x.mul_(keys[:, 2 * turn : 2 * turn + 1] | 1).add_(keys[:, 2 * turn + 1 : 2 * turn + 2])
        x.bitwise_and_(low)
        x.bitwise_xor_(x >> half)
    return x


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
    out = image.clone(memory_format=torch.contiguous_format)
    plane = height * width
    flat, original = out.view(-1), image.reshape(-1)
    for length in sorted(set(side.tolist())):  # a loop over sizes, mostly one
        at = (side == length).nonzero().squeeze(1)
        for part in chunks(kept[to_device(at, image.device)]):
            rows = at[part]
            on_device = to_device(rows, image.device)
            dest, source = _exchanged(~kept[on_device, 0], length, fraction[rows].cpu(), seeds[rows])
            sample = torch.div(dest, plane, rounding_mode="floor")
            first = on_device[sample] * (channels * plane) - sample * plane
            dest, source = dest + first, source + first
            for channel in range(channels):
                flat[dest + channel * plane] = original[source + channel * plane]
    return out


def _exchanged(outside: Tensor, length: int, fraction: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Where to and where from: two (Q,) int64, positions in the flattened (n, H, W) planes.

    Args:
        outside: (n, H, W) bool.
        length: side of a block.
        fraction: (n,) on the CPU.
        seeds: (n,) int64 on the CPU.
    """
    count, height, width = outside.shape
    device = outside.device
    rows, columns = -(-height // length), -(-width // length)
    blocks = rows * columns
    order = _scattered_order(to_device(seeds, device), blocks)
    real = order < blocks
    order = order.clamp(max=blocks - 1)
    if bool((fraction < 1).any()):
        part = hash_uniform(seeds, _TAKE_PART_STREAM, blocks) < fraction.unsqueeze(1)
        real &= to_device(part, device).gather(1, order)
    if length == 1:
        first = torch.arange(count, device=device).unsqueeze(1) * (height * width)
        position = order + first
        ring = outside.flatten()[position] & real
        return _turned(position[ring], ring)
    # Corners of the blocks in the order of the round; then, for each offset in a block, the pixels along the round.
    top = torch.div(order, columns, rounding_mode="floor") * length
    left = order.remainder(columns) * length
    offset = torch.arange(length, device=device)
    y = top.view(count, 1, 1, -1) + offset.view(1, -1, 1, 1)
    x = left.view(count, 1, 1, -1) + offset.view(1, 1, -1, 1)
    inside_tile = (y < height) & (x < width) & real.view(count, 1, 1, -1)
    position = y.clamp(max=height - 1) * width + x.clamp(max=width - 1)
    position = position + torch.arange(count, device=device).view(-1, 1, 1, 1) * (height * width)
    takes_part = outside.flatten()[position] & inside_tile
    ring = takes_part.flatten(0, 2)
    return _turned(position.flatten(0, 2)[ring], ring)


def _turned(dest: Tensor, ring: Tensor) -> tuple[Tensor, Tensor]:
    """Positions on their rounds, row after row of ``ring`` (R, L), and those that come next on the same round."""
    if not len(dest):
        return dest, dest
    counts = ring.sum(1)
    counts = counts[counts > 0]
    last = counts.cumsum(0) - 1
    following = torch.arange(1, len(dest) + 1, device=dest.device)
    following[last] = last + 1 - counts
    return dest, dest[following]
