"""One perturbation of a batch, given what was drawn: the path that every transform and module here takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cytossl_monai.transforms.kernels.blur import blur
from cytossl_monai.transforms.kernels.checks import real_pixels
from cytossl_monai.transforms.kernels.chunks import chunks
from cytossl_monai.transforms.kernels.colour import jitter_stain
from cytossl_monai.transforms.kernels.device import to_device
from cytossl_monai.transforms.ncp import operations as ncp
from cytossl_monai.transforms.ncp.exchange import exchange_outside, kept_discs, retained_nuclei
from cytossl_monai.transforms.ncp.settings import BLUR_SIGMA_UM, CUTOUT_SIDE, NOISE_STD, Draw, NCPSettings
from cytossl_monai.transforms.nuclei.centres import NucleiCentres

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
    masks: Tensor | None,
    mpp: Tensor,
    draw: Draw,
    settings: NCPSettings,
    donors: Tensor | None = None,
    donor_masks: Tensor | None = None,
    out: Tensor | None = None,
    nuclei: NucleiCentres | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Perturb all but the nuclei: ``a * image + (1 - a) * P(background)``.

    Args:
        images: (B, C, H, W), uint8 or floating point in [0, 1]; not written to.
        masks: (B, 1, H, W) bool, True on nuclei; None where only their centres are known, which discs around them need.
        mpp: (B,) float32 on the CPU, micrometres per pixel.
        draw: what is done to each sample.
        settings: lengths, and what becomes of a tile without nuclei.
        donors: (D, C, H, W), like ``images``: where ``draw.donor`` points to; None is ``images`` itself.
        donor_masks: (D, 1, H, W) bool: the donors' nuclei, which are painted over; None is ``masks`` where ``donors``
            is None, and no nuclei otherwise.
        out: where to write, like ``images`` and contiguous; ``images`` itself is allowed. None makes a new tensor.
        nuclei: the single nuclei; None takes the parts of ``masks``, where they are needed.
        valid: (B, 4) of :func:`check_valid`: the real pixels, among which alone ``exchange`` changes places; a nucleus
            outside (mirrored fill has some) is none. None: all pixels are real.

    Returns:
        ``out``; pixels of retained nuclei are bit-identical to the input's.

    Raises:
        ValueError: for discs below a pixel.
    """
    if out is None:
        out = torch.empty_like(images, memory_format=torch.contiguous_format)
    in_place, result = out is images, out
    # A MetaTensor takes its metadata through every operation, which costs more than most of them.
    if donors is None:
        donors, donor_masks = images, masks
    images, donors, out = (x.as_subclass(Tensor) for x in (images, donors, out))
    masks = None if masks is None else masks.as_subclass(Tensor)
    donor_masks = None if donor_masks is None else donor_masks.as_subclass(Tensor)
    if settings.by_nucleus and nuclei is None:
        if masks is None:
            raise ValueError("masks is missing; allowed without masks are the nuclei's centres")
        nuclei = NucleiCentres.of_masks(masks)
    if nuclei is not None and valid is not None:
        nuclei = nuclei.inside(valid)
    active = draw.active()
    if settings.empty == "keep":
        if settings.by_nucleus and nuclei is not None:
            active &= nuclei.counts() > 0
        elif masks is not None:
            active &= masks.flatten(1).any(1).cpu()
    backgrounds = _backgrounds(mpp, draw, settings, donors, donor_masks, active)  # before anything is written to
    for part in chunks(images):
        rows = active[part].nonzero().squeeze(1) + part.start
        if len(rows) < part.stop - part.start and not in_place:
            out[part] = images[part]
        if len(rows):
            at = to_device(rows, images.device)
            stay = _what_stays(masks, nuclei, mpp, draw, settings, rows, images)
            real = None if valid is None else to_device(real_pixels(valid[rows], *images.shape[-2:]), images.device)
            out.index_copy_(0, at, _perturb_part(images, stay, mpp, draw, settings, backgrounds, rows, real))
    return result


def _what_stays(
    masks: Tensor | None,
    nuclei: NucleiCentres | None,
    mpp: Tensor,
    draw: Draw,
    settings: NCPSettings,
    rows: Tensor,
    images: Tensor,
) -> Tensor:
    """(n, 1, H, W) bool: the pixels of the samples ``rows`` that leave as they came, margins not counted."""
    if not settings.by_nucleus or nuclei is None:
        assert masks is not None
        return masks.index_select(0, to_device(rows, images.device))
    some = nuclei.of(rows)
    retained = retained_nuclei(some, draw.seeds[rows], settings.retain_prob)
    if settings.keep_radius_um > 0:
        radius = settings.keep_radius_um / mpp[rows]
        if float(radius.min()) < 1:
            raise ValueError(
                f"keep_radius_um {settings.keep_radius_um:g} is {float(radius.min()):.2g} pixels; at least one is "
                "needed: enlarge it, or give the right mpp"
            )
    else:
        radius = torch.zeros(len(rows))
    return to_device(kept_discs(some, retained, radius, *images.shape[-2:]), images.device)


@dataclass
class _Backgrounds:
    """The backgrounds that ``swap`` takes: (n, C, H, W) float32, and which of them is whose, (B,) int64 on the CPU."""

    plates: Tensor
    place: Tensor


def _weight(masks: Tensor, mpp: Tensor, settings: NCPSettings) -> Tensor:
    """:func:`functional.nuclear_weight` with lengths in micrometres."""
    return ncp.nuclear_weight(masks, settings.margin_um / mpp, settings.feather_um / mpp)


def _backgrounds(
    mpp: Tensor, draw: Draw, settings: NCPSettings, donors: Tensor, donor_masks: Tensor | None, active: Tensor
) -> _Backgrounds | None:
    """Backgrounds for the samples that take another's; None where none does."""
    if "swap" not in draw.amounts:
        return None
    rows = (active & (draw.amounts["swap"] > 0)).nonzero().squeeze(1)
    giver = to_device(draw.donor[rows], donors.device)
    plates = _unit(donors.index_select(0, giver))
    if donor_masks is not None:
        for part in chunks(plates):
            nuclei = donor_masks.index_select(0, giver[part])
            plates[part] = ncp.background_plate(plates[part], _weight(nuclei, mpp[rows[part]], settings))
    place = torch.zeros(len(mpp), dtype=torch.int64)
    place[rows] = torch.arange(len(rows))
    return _Backgrounds(plates, place)


def _perturb_part(
    images: Tensor,
    stay: Tensor,
    mpp: Tensor,
    draw: Draw,
    settings: NCPSettings,
    backgrounds: _Backgrounds | None,
    rows: Tensor,
    real: Tensor | None = None,
) -> Tensor:
    """:func:`perturb` for the samples ``rows`` ((n,) int64 on the CPU), each of which at least one op acts on."""
    device = images.device
    original = images.index_select(0, to_device(rows, device))
    mpp, seeds = mpp[rows], draw.seeds[rows]
    amounts = {name: amount[rows] for name, amount in draw.amounts.items()}
    discs = settings.keep_radius_um > 0
    drawn_ops = {name for name, amount in amounts.items() if bool((amount > 0).any())}
    if discs and drawn_ops <= {"exchange"}:  # pixels move and no colour is computed: the input's own type will do
        still = stay if real is None else stay | ~real
        return exchange_outside(original, still, settings.block_um / mpp, amounts["exchange"], seeds)
    unit = _unit(original)
    weight = stay.to(torch.float32) if discs else _weight(stay, mpp, settings)
    pixels = ncp.NuclearPixels.of(weight, unit.shape[1])
    plate = ncp.background_plate(unit, weight, pixels)
    # Of the plate as it is before anything is done to it.
    colour = ncp.glass_colour(plate) if any(bool((amounts[n] > 0).any()) for n in _GLASS_OPS & amounts.keys()) else None
    for name, amount in amounts.items():
        drawn = (amount > 0).nonzero().squeeze(1)
        if len(drawn) == 0:
            continue
        at = to_device(drawn, device)
        here = plate.index_select(0, at) if len(drawn) < len(plate) else plate
        much, seed, scale = amount[drawn], seeds[drawn], mpp[drawn]
        if name == "swap" and backgrounds is not None:
            theirs = backgrounds.plates.index_select(0, to_device(backgrounds.place[rows[drawn]], device))
            here = ncp.swap_background(here, theirs, much)
        elif name == "shuffle":
            here = ncp.shuffle_patches(here, settings.patch_um / scale, much, seed)
        elif name == "stain":
            here = jitter_stain(here, much, seed)
        elif name == "blur":
            here = blur(here, much * BLUR_SIGMA_UM / scale)
        elif name == "exchange":
            kept = weight.index_select(0, at) > 0
            kept = kept if real is None else kept | ~real.index_select(0, at)
            here = exchange_outside(here, kept, settings.block_um / scale, much, seed)
        elif name == "noise":
            here = ncp.add_noise(here, much * NOISE_STD, seed)
        elif name == "fade" and colour is not None:
            here = ncp.fade(here, much, colour.index_select(0, at))
        elif name == "cutout" and colour is not None:
            here = ncp.cut_out(here, much * CUTOUT_SIDE, seed, colour.index_select(0, at))
        else:
            raise ValueError(f"draw names an unknown op {name!r}")
        plate = plate.index_copy_(0, at, here) if len(drawn) < len(plate) else here
    mixed = _like(ncp.keep_nuclei_(plate, unit, pixels), images.dtype)
    if images.dtype in (torch.uint8, torch.float32):  # whose values survived the way there and back
        return mixed
    return torch.where(stay, original, mixed)
