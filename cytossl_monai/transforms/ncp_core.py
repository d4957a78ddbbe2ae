"""One perturbation of a batch, given what was drawn: the path that every transform and module here takes."""

from __future__ import annotations

import torch
from torch import Tensor

from cytossl_monai.transforms import functional as ncp
from cytossl_monai.transforms.ncp_settings import BLUR_SIGMA_UM, CUTOUT_SIDE, NOISE_STD, Draw, NCPSettings

__all__ = ["perturb"]

# Samples that are worked on at a time on a CPU. Whole batches run from main memory and every step pays for fresh pages
# of the system; sixteen tiles of 224 px (9.6 MB a step) are reused from one step to the next.
_CPU_CHUNK = 16


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
    rows = draw.active().nonzero().squeeze(1)
    if donors is None:
        donors, donor_masks = images, masks
    step = _CPU_CHUNK if images.device.type == "cpu" else max(len(rows), 1)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        on_device = part.to(images.device)
        out[on_device] = _perturb_part(images, masks, mpp, draw, settings, donors, donor_masks, part)
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
    mpp = mpp[rows]
    seeds = draw.seeds[rows]
    amounts = {name: amount[rows] for name, amount in draw.amounts.items()}

    def plate_of(picture: Tensor, nuclei: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        weight = ncp.nuclear_weight(nuclei, settings.margin_um / scale, settings.feather_um / scale)
        return ncp.background_plate(picture, weight), weight

    plate, weight = plate_of(unit, mask, mpp)
    colour = ncp.glass_colour(plate)
    for name, amount in amounts.items():
        drawn = (amount > 0).nonzero().squeeze(1)
        if len(drawn) == 0:
            continue
        at = drawn.to(device)
        here, much, seed = plate.index_select(0, at), amount[drawn], seeds[drawn]
        if name == "swap":
            giver = draw.donor[rows[drawn]].to(device)
            given = _unit(donors.index_select(0, giver))
            if donor_masks is not None:
                given, _ = plate_of(given, donor_masks.index_select(0, giver), mpp[drawn])
            here = ncp.swap_background(here, given, much)
        elif name == "shuffle":
            here = ncp.shuffle_patches(here, settings.patch_um / mpp[drawn], much, seed)
        elif name == "stain":
            here = ncp.jitter_stain(here, much, seed)
        elif name == "blur":
            here = ncp.blur(here, much * BLUR_SIGMA_UM / mpp[drawn])
        elif name == "fade":
            here = ncp.fade(here, much, colour.index_select(0, at))
        elif name == "cutout":
            here = ncp.cut_out(here, much * CUTOUT_SIDE, seed, colour.index_select(0, at))
        elif name == "noise":
            here = ncp.add_noise(here, much * NOISE_STD, seed)
        else:
            raise ValueError(f"draw names an unknown op {name!r}")
        plate[at] = here
    mixed = _like(torch.lerp(plate, unit, weight).clamp_(0.0, 1.0), images.dtype)
    untouched = mask
    if settings.empty == "keep":
        untouched = mask | ~mask.flatten(1).any(1).view(-1, 1, 1, 1)
    return torch.where(untouched, original, mixed)
