"""Colour: stains of a batch made stronger and weaker."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from skimage.color import rgb_from_hed
from torch import Tensor

from cytossl_monai.transforms.kernels.device import to_device
from cytossl_monai.transforms.kernels.random import hash_uniform

__all__ = ["jitter_stain"]

# Streams of the random numbers: one for each use, so that no two uses share numbers.
_STAIN_STREAM = 200  # its own random numbers; see `ncp.operations` for the others


_MIN_TRANSMISSION = 1.0 / 255.0  # optical density is taken of no less than one grey level


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
    packed = torch.cat([matrix, -(shifts @ stains).unsqueeze(1)], 1).to(torch.float32)
    *mixed, bias = to_device(packed, image.device).view(-1, channels + 1, channels, 1, 1).unbind(1)
    log = image.clamp_min(_MIN_TRANSMISSION).log_()
    # No matrix product: its bits depend on the size of the batch.
    out = torch.addcmul(bias, log[:, :1], mixed[0])
    for source in range(1, channels):
        out.addcmul_(log[:, source : source + 1], mixed[source])
    return out.exp_().clamp_(max=1.0)
