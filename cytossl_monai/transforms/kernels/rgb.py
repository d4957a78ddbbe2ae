"""Colour jitter in RGB, as recipes for photographs use it: for a whole batch, a strength a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cytossl_monai.transforms.kernels.device import to_device
from cytossl_monai.transforms.kernels.random import hash_uniform

__all__ = ["RGBJitter", "jitter_rgb"]

_STREAM = 700
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class RGBJitter:
    """How much each quality of a colour varies; DINO takes 0.4, 0.4, 0.2, 0.1.

    Args:
        brightness: values are multiplied by 1 - brightness to 1 + brightness, in [0, 1].
        contrast: the distance from the image's mean grey, likewise, in [0, 1].
        saturation: the distance from each pixel's grey, likewise, in [0, 1].
        hue: turned by -hue to hue of a full circle, in [0, 0.5].

    Raises:
        ValueError: for a number outside its range.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1

    def __post_init__(self) -> None:
        for name, most in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            if not 0.0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"rgb_jitter's {name} is {getattr(self, name)!r}; allowed is a number in [0, {most:g}]"
                )


def _grey(image: Tensor) -> Tensor:
    red, green, blue = image.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)


def turn_hue(image: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue, in HSV.

    Args:
        image: (B, 3, H, W) float32 in [0, 1].
        turn: (B, 1, 1) part of a full circle.

    Returns:
        The same shape.
    """
    high, low = image.amax(1), image.amin(1)
    span = (high - low).clamp_min(1e-12)
    red, green, blue = image.unbind(1)
    sixth = torch.where(
        high == red,
        (green - blue) / span,
        torch.where(high == green, 2 + (blue - red) / span, 4 + (red - green) / span),
    )
    hue = torch.remainder(sixth / 6 + turn, 1.0)
    # f(n) = v - v s max(0, min(k, 4 - k, 1)) with k = (n + 6 h) mod 6, for n = 5, 3, 1: red, green, blue.
    channels = []
    for start in (5.0, 3.0, 1.0):
        k = torch.remainder(start + 6 * hue, 6.0)
        channels.append(high - (high - low) * torch.minimum(k, 4 - k).clamp(0.0, 1.0))
    return torch.stack(channels, 1)


def jitter_rgb(image: Tensor, jitter: RGBJitter, seeds: Tensor) -> Tensor:
    """Vary brightness, contrast, saturation and hue, in this order.

    Args:
        image: (B, 3, H, W) float32 in [0, 1].
        jitter: how much at most.
        seeds: (B,) int64 on the CPU.

    Returns:
        (B, 3, H, W) float32 in [0, 1].
    """
    drawn = to_device(hash_uniform(seeds, _STREAM, 4).mul_(2.0).sub_(1.0).to(torch.float32), image.device)
    brightness, contrast, saturation, hue = (column.view(-1, 1, 1, 1) for column in drawn.unbind(1))
    out = (image * (1 + jitter.brightness * brightness)).clamp_(0.0, 1.0)
    mean = _grey(out).mean((2, 3), keepdim=True)
    out = torch.lerp(mean.expand_as(out), out, 1 + jitter.contrast * contrast).clamp_(0.0, 1.0)
    out = torch.lerp(_grey(out).expand_as(out), out, 1 + jitter.saturation * saturation).clamp_(0.0, 1.0)
    if jitter.hue > 0:
        out = turn_hue(out, jitter.hue * hue.view(-1, 1, 1)).clamp_(0.0, 1.0)
    return out
