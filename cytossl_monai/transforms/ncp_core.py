"""One perturbation of a batch, given what was drawn: the path that every transform and module here takes."""

from __future__ import annotations

import torch
from torch import Tensor

from cytossl_monai.transforms import functional as ncp
from cytossl_monai.transforms.chunks import chunks
from cytossl_monai.transforms.ncp_settings import BLUR_SIGMA_UM, CUTOUT_SIDE, NOISE_STD, Draw, NCPSettings

__all__ = ["perturb"]

_GLASS_OPS = frozenset({"fade", "cutout"})  # those that need the colour of the empty slide


def _unit(images: Tensor) -> Tensor:
    """Float32 in [0, 1], contiguous; new memory or the input's own (never written to)."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(255.0).contiguous()
    return images.to(torch.float32).contiguous()


def _like(unit: Tensor, dtype: torch.dtype) -> Tensor:
    """From float32 in [0, 1] back to the dtype that came."""
    return unit.mul(255.0).round_().to(torch.uint8) if dtype == torch.uint8 else unit.to(dtype)


def perturb(
    images: Tensor,
    masks: Tensor,
    mpp: Tensor,
    draw: Draw,
    settings: NCPSettings,
    donors: Tensor | None = None,
    donor_masks: Tensor | None = None,
) -> Tensor:
    """Perturb all but the nuclei: ``a * image + (1 - a) * P(background)``.

    Args:
        images: (B, C, H, W), uint8 or floating point in [0, 1]; not written to.
        masks: (B, 1, H, W) bool, True on nuclei.
        mpp: (B,) float32 on the CPU, micrometres per pixel.
        draw: what is done to each sample.
        settings: lengths, and what becomes of a tile without nuclei.
        donors: (D, C, H, W), like ``images``: where ``draw.donor`` points to; None is ``images`` itself.
        donor_masks: (D, 1, H, W) bool: the donors' nuclei, which are painted over; None is ``masks`` where ``donors``
            is None, and no nuclei otherwise.

    Returns:
        A new tensor of the images' shape, dtype and device; nuclear pixels are bit-identical to the input's.
    """
    out = images.clone(memory_format=torch.contiguous_format)
    if donors is None:
        donors, donor_masks = images, masks
    active = draw.active()
    if settings.empty == "keep":
        active &= masks.flatten(1).any(1).cpu()
    for part in chunks(len(images), images.device):
        rows = active[part].nonzero().squeeze(1) + part.start
        if len(rows):
            at = rows.to(images.device)
            out.index_copy_(0, at, _perturb_part(images, masks, mpp, draw, settings, donors, donor_masks, rows))
    return out


def _perturb_part(
    images: Tensor,
    masks: Tensor,
    mpp: Tensor,
    draw: Draw,
    settings: NCPSettings,
    donors: Tensor,
    donor_masks: Tensor | None,
    rows: Tensor,
) -> Tensor:
    """:func:`perturb` for the samples ``rows`` ((n,) int64 on the CPU), each of which at least one op acts on."""
    device = images.device
    original = images.index_select(0, rows.to(device))
    mask = masks.index_select(0, rows.to(device))
    unit = _unit(original)
    mpp, seeds = mpp[rows], draw.seeds[rows]
    amounts = {name: amount[rows] for name, amount in draw.amounts.items()}

    def weight_of(nuclei: Tensor, scale: Tensor) -> Tensor:
        return ncp.nuclear_weight(nuclei, settings.margin_um / scale, settings.feather_um / scale)

    weight = weight_of(mask, mpp)
    plate = ncp.background_plate(unit, weight)
    # Of the plate as it is before anything is done to it.
    colour = ncp.glass_colour(plate) if any(bool((amounts[n] > 0).any()) for n in _GLASS_OPS & amounts.keys()) else None
    for name, amount in amounts.items():
        drawn = (amount > 0).nonzero().squeeze(1)
        if len(drawn) == 0:
            continue
        at = drawn.to(device)
        here = plate.index_select(0, at) if len(drawn) < len(plate) else plate
        much, seed, scale = amount[drawn], seeds[drawn], mpp[drawn]
        if name == "swap":
            giver = draw.donor[rows[drawn]].to(device)
            given = _unit(donors.index_select(0, giver))
            if donor_masks is not None:
                given = ncp.background_plate(given, weight_of(donor_masks.index_select(0, giver), scale))
            here = ncp.swap_background(here, given, much)
        elif name == "shuffle":
            here = ncp.shuffle_patches(here, settings.patch_um / scale, much, seed)
        elif name == "stain":
            here = ncp.jitter_stain(here, much, seed)
        elif name == "blur":
            here = ncp.blur(here, much * BLUR_SIGMA_UM / scale)
        elif name == "noise":
            here = ncp.add_noise(here, much * NOISE_STD, seed)
        elif name == "fade" and colour is not None:
            here = ncp.fade(here, much, colour.index_select(0, at))
        elif name == "cutout" and colour is not None:
            here = ncp.cut_out(here, much * CUTOUT_SIDE, seed, colour.index_select(0, at))
        else:
            raise ValueError(f"draw names an unknown op {name!r}")
        plate = plate.index_copy_(0, at, here) if len(drawn) < len(plate) else here
    mixed = _like(ncp.keep_nuclei_(plate, unit, weight), images.dtype)
    if images.dtype in (torch.uint8, torch.float32):  # whose values survived the way there and back
        return mixed
    return torch.where(mask, original, mixed)
