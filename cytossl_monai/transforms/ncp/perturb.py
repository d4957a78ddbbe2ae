"""One perturbation of a batch, given what was drawn: the path that every transform and module here takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cytossl_monai.transforms.kernels.blur import blur
from cytossl_monai.transforms.kernels.checks import real_pixels
from cytossl_monai.transforms.kernels.chunks import chunks, share_memory
from cytossl_monai.transforms.kernels.colour import jitter_stain
from cytossl_monai.transforms.kernels.device import to_device
from cytossl_monai.transforms.ncp import operations as ncp
from cytossl_monai.transforms.ncp.exchange import exchange_outside, kept_discs, retained_nuclei
from cytossl_monai.transforms.ncp.settings import BLUR_SIGMA_UM, CUTOUT_SIDE, NOISE_STD, Draw, NCPSettings
from cytossl_monai.transforms.nuclei.centres import NucleiCentres

__all__ = ["perturb"]

_GLASS_OPS = frozenset({"fade", "cutout"})  # those that need the colour of the empty slide


def _unit(images: Tensor) -> Tensor:
    """Float32 in [0, 1], contiguous; new memory or the input's own."""
    if images.dtype == torch.uint8:
        return images.div(255.0).contiguous()
    return images.to(torch.float32).contiguous()


def _like_(unit: Tensor, dtype: torch.dtype) -> Tensor:
    """From float32 in [0, 1] back to the dtype that came; written to on the way."""
    return unit.mul_(255.0).round_().to(torch.uint8) if dtype == torch.uint8 else unit.to(dtype)


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
    parts = list(chunks(images))
    if len(parts) > 1 and draw.acts("swap") and share_memory(out, donors):
        donors = donors.clone()  # or later parts would take what earlier ones have made
    for part in parts:
        rows = active[part].nonzero().squeeze(1) + part.start
        if len(rows) < part.stop - part.start and not in_place:
            out[part] = images[part]
        if len(rows):
            at = to_device(rows, images.device)
            original = images.index_select(0, at)
            stay = _what_stays(masks, nuclei, mpp, draw, settings, rows, at, images)
            real = None if valid is None else to_device(real_pixels(valid[rows], *images.shape[-2:]), images.device)
            out.index_copy_(0, at, _perturb_part(original, stay, mpp, draw, settings, donors, donor_masks, rows, real))
    return result


def _what_stays(
    masks: Tensor | None,
    nuclei: NucleiCentres | None,
    mpp: Tensor,
    draw: Draw,
    settings: NCPSettings,
    rows: Tensor,
    at: Tensor,
    images: Tensor,
) -> Tensor:
    """(n, 1, H, W) bool: the pixels of the samples ``rows`` that leave as they came, margins not counted.

    ``rows`` lie on the CPU, ``at`` are the same on the images' device.
    """
    if not settings.by_nucleus or nuclei is None:
        assert masks is not None
        return masks.index_select(0, at)
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
class _Act:
    """One op and the samples of a part that it acts on; all but ``at`` lie on the CPU.

    Attributes:
        name: of the op.
        at: (n,) int64 on the images' device, the rows in the part.
        much: (n,) float32, how much.
        seeds: (n,) int64.
        mpp: (n,) float32.
        donor: (n,) int64, the sample whose background "swap" takes.
    """

    name: str
    at: Tensor
    much: Tensor
    seeds: Tensor
    mpp: Tensor
    donor: Tensor


def _acts(draw: Draw, mpp: Tensor, rows: Tensor, device: torch.device) -> list[_Act]:
    """What is done to the samples ``rows`` ((n,) int64 on the CPU), in order; the device gets all rows in one copy."""
    amounts = torch.stack(list(draw.amounts.values()))[:, rows]
    hit = amounts > 0
    place = hit.nonzero()[:, 1]
    whole = rows[place]
    counts = hit.sum(1).tolist()
    numbers = (to_device(place, device), amounts[hit], draw.seeds[whole], mpp[whole], draw.donor[whole])
    each = zip(draw.amounts, *(values.split(counts) for values in numbers), strict=True)
    return [_Act(*one) for one in each if len(one[1])]


def _perturb_part(
    original: Tensor,
    stay: Tensor,
    mpp: Tensor,
    draw: Draw,
    settings: NCPSettings,
    donors: Tensor,
    donor_masks: Tensor | None,
    rows: Tensor,
    real: Tensor | None = None,
) -> Tensor:
    """:func:`perturb` for the samples ``rows`` ((n,) int64 on the CPU), each of which at least one op acts on."""
    count, device = len(rows), original.device
    acts = _acts(draw, mpp, rows, device)
    discs = settings.keep_radius_um > 0
    if discs and all(act.name == "exchange" for act in acts):
        # Pixels move and no colour is computed: the input's own type will do.
        still = stay if real is None else stay | ~real
        (act,) = acts
        return exchange_outside(original, still, settings.block_um / act.mpp, act.much, act.seeds)
    # Beside the samples lie those whose backgrounds they take: both are painted over at once.
    taken = next((act for act in acts if act.name == "swap"), None)
    unit, weight = _with_donors(original, stay, mpp[rows], settings, taken, donors, donor_masks)
    pixels = ncp.NuclearPixels.of(weight, unit.shape[1])
    own = ncp.paint_over_(unit, weight, pixels)
    whole, theirs = unit[:count], unit[count:]
    plate = whole
    # Of the plate as it is before anything is done to it.
    colour = ncp.glass_colour(plate) if any(act.name in _GLASS_OPS for act in acts) else None
    for act in acts:
        name, at, much, seeds, scale = act.name, act.at, act.much, act.seeds, act.mpp
        here = plate.index_select(0, at) if len(at) < count else plate
        if name == "swap":
            here = ncp.swap_background(here, theirs, much)
        elif name == "shuffle":
            here = ncp.shuffle_patches(here, settings.patch_um / scale, much, seeds)
        elif name == "stain":
            here = jitter_stain(here, much, seeds)
        elif name == "blur":
            here = blur(here, much * BLUR_SIGMA_UM / scale)
        elif name == "exchange":
            kept = weight.index_select(0, at) > 0
            kept = kept if real is None else kept | ~real.index_select(0, at)
            here = exchange_outside(here, kept, settings.block_um / scale, much, seeds)
        elif name == "noise":
            here = ncp.add_noise(here, much * NOISE_STD, seeds)
        elif name == "fade" and colour is not None:
            here = ncp.fade(here, much, colour.index_select(0, at))
        elif name == "cutout" and colour is not None:
            here = ncp.cut_out(here, much * CUTOUT_SIDE, seeds, colour.index_select(0, at))
        else:
            raise ValueError(f"draw names an unknown op {name!r}")
        if len(at) < count:
            plate.index_copy_(0, at, here)
        else:
            plate = here
    if taken is None:
        unit = plate
    elif plate is not whole:
        whole.copy_(plate)
    mixed = _like_(ncp.keep_nuclei_(unit, own, pixels)[:count], original.dtype)
    if original.dtype in (torch.uint8, torch.float32):  # whose values survived the way there and back
        return mixed
    return torch.where(stay, original, mixed)


def _with_donors(
    original: Tensor,
    stay: Tensor,
    mpp: Tensor,
    settings: NCPSettings,
    taken: _Act | None,
    donors: Tensor,
    donor_masks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The samples, after them the donors of those in ``taken``, and how much of each pixel is nuclear.

    Returns:
        (n + d, C, H, W) float32 in [0, 1], new memory; and (n + d, 1, H, W) float32 in [0, 1].
    """
    discs = settings.keep_radius_um > 0
    if taken is None:
        unit = _unit(original)
        weight = stay.to(torch.float32) if discs else _weight(stay, mpp, settings)
        return unit, weight
    giver = to_device(taken.donor, donors.device)
    unit = _unit(torch.cat([original, donors.index_select(0, giver)]))
    if donor_masks is None:
        theirs = torch.zeros_like(stay[:1]).expand(len(giver), -1, -1, -1)
    else:
        theirs = donor_masks.index_select(0, giver)
    if not discs:
        return unit, _weight(torch.cat([stay, theirs]), torch.cat([mpp, taken.mpp]), settings)
    return unit, torch.cat([stay.to(torch.float32), _weight(theirs, taken.mpp, settings)])


def _weight(masks: Tensor, mpp: Tensor, settings: NCPSettings) -> Tensor:
    """:func:`ncp.nuclear_weight` with lengths in micrometres."""
    return ncp.nuclear_weight(masks, settings.margin_um / mpp, settings.feather_um / mpp)
