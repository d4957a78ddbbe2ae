"""Counter-based random numbers: a pure function of (seed, stream, position), the same on every device and batch size.

A ``torch.Generator`` gives other numbers on a GPU than on a CPU, and other ones to the third sample of a batch than to
the same sample alone. Here every sample has a seed of its own and every number is a hash of that seed, the name of
what it is for (its stream) and its position. So a sample is perturbed alike alone, in a batch and on another device,
without a loop over samples. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
number generators", OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cytossl_monai.transforms.kernels.device import made_once, to_device

__all__ = ["draw_seeds", "hash_noise", "hash_uniform", "hash_uniforms", "mix64"]


def _signed(value: int) -> int:
    """The 64-bit pattern of ``value`` as the signed integer that torch's int64 holds."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _stream_key(stream: int) -> int:
    """A far-apart offset for every stream."""
    return _signed(stream * 0xBF58476D1CE4E5B9 & _ALL_BITS)


_ALL_BITS = (1 << 64) - 1
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _xor_shift_(x: Tensor, shift: int) -> Tensor:
    """``x ^= x >>> shift`` in place; torch shifts int64 arithmetically, so the copied sign bits are masked off."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def mix64(x: Tensor) -> Tensor:
    """Scramble 64-bit integers with the finaliser of SplitMix64.

    Args:
        x: int64 tensor of any shape; not written to.

    Returns:
        int64 tensor of the same shape. Multiplications wrap around, as they do in C for unsigned integers.
    """
    return mix64_(x.clone())


def mix64_(x: Tensor) -> Tensor:
    """:func:`mix64` in place."""
    if x.device.type == "cpu":  # NumPy shifts unsigned integers, and is called in a fraction of the time
        bits = x.numpy().view(np.uint64)
        for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
            bits ^= bits >> np.uint64(shift)
            bits *= np.uint64(factor & _ALL_BITS)
        bits ^= bits >> np.uint64(31)
        return x
    _xor_shift_(x, 30).mul_(_MIX_1)
    _xor_shift_(x, 27).mul_(_MIX_2)
    return _xor_shift_(x, 31)


@made_once
def _positions(count: int, device: torch.device) -> Tensor:
    """(count,) int64: what tells the numbers of one seed and stream apart."""
    return torch.arange(1, count + 1, dtype=torch.int64, device=device) * _GOLDEN


def draw_seeds(count: int, generator: torch.Generator | None = None) -> Tensor:
    """One seed a sample.

    Args:
        count: number of seeds.
        generator: where they come from (any device); None takes torch's global CPU generator.

    Returns:
        (count,) int64 in [0, 2**62), on the CPU, so that what is drawn from them costs no device synchronisation.
    """
    device = "cpu" if generator is None else generator.device
    return torch.randint(0, 1 << 62, (count,), generator=generator, device=device).cpu()


def hash_uniform(seeds: Tensor, stream: int, count: int) -> Tensor:
    """Uniform numbers.

    Args:
        seeds: (B,) int64, one seed a sample.
        stream: which use they are for; two streams of one seed are independent.
        count: how many a sample.

    Returns:
        (B, count) float64 in [0, 1), on the seeds' device.
    """
    return hash_uniforms(seeds, (stream,), count)[0]


def hash_uniforms(seeds: Tensor, streams: tuple[int, ...], count: int) -> Tensor:
    """The numbers of :func:`hash_uniform` of several streams at once: (S, B, count) float64."""
    keys = mix64_(seeds + _stream_keys(streams, seeds.device))
    keys = mix64_(keys.unsqueeze(2) + _positions(count, seeds.device))
    return ((keys >> 11) & ((1 << 53) - 1)).to(torch.float64).mul_(2.0**-53)


@made_once
def _stream_keys(streams: tuple[int, ...], device: torch.device) -> Tensor:
    """(S, 1) int64."""
    return to_device(torch.tensor([[_stream_key(stream)] for stream in streams], dtype=torch.int64), device)


def hash_noise(
    seeds: Tensor, stream: int, channels: int, height: int, width: int, device: torch.device | None = None
) -> Tensor:
    """White noise fields, near to normal.

    Each value is the sum of three uniform 7-bit numbers, centred and scaled: exact integer arithmetic, hence equal
    bits on every device. Mean 0, standard deviation 1, bounded by 3, excess kurtosis -0.4.

    Args:
        seeds: (B,) int64, one seed a sample.
        stream: which use it is for.
        channels: independent fields a sample.
        height: rows.
        width: columns.
        device: where the noise is wanted; None is the seeds' own.

    Returns:
        (B, channels, height, width) float32.
    """
    device = seeds.device if device is None else device
    pixel = _positions(height * width, device)
    out = torch.empty(len(seeds), channels, height * width, device=device)
    every_third = 127 | 127 << 21 | 127 << 42
    for first in range(0, channels, 3):  # one hash holds three channels of three numbers
        keys = mix64_(to_device(mix64(seeds + _stream_key(stream + first)), device).unsqueeze(1) + pixel)
        fields = keys & every_third
        for _ in range(2):
            keys >>= 7
            fields += keys & every_third
        for channel in range(first, min(first + 3, channels)):
            out[:, channel] = fields & 511
            if channel + 1 < channels:
                fields >>= 21
    # A uniform number of {0..127} has the variance (128^2 - 1) / 12; three of them have the mean 190.5.
    return out.sub_(190.5).mul_(((128**2 - 1) / 4) ** -0.5).view(len(seeds), channels, height, width)
