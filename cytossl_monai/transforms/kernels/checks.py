"""Checks of what goes into a perturbation or a view: one sentence that names the key, what came and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from cytossl_monai.transforms.kernels.device import to_device

__all__ = ["check_images", "check_masks", "check_mpp", "check_valid", "real_pixels", "stated_mpp"]


def check_images(images: Any, key: str = "images", dims: int = 4, values: bool = True) -> None:
    """Images have 1 or 3 channels, are uint8 or floating point in [0, 1], and hold no NaN.

    Args:
        images: (B, C, H, W), or (C, H, W) for ``dims`` 3.
        key: what to call them in a message.
        dims: how many dimensions are wanted.
        values: look at the values too, which makes a GPU wait.

    Raises:
        ValueError: where they are not.
    """
    wanted = "(batch, 3 or 1, height, width)" if dims == 4 else "(3 or 1, height, width)"
    if not isinstance(images, Tensor):
        raise ValueError(f"{key} is a {type(images).__name__}; allowed is a tensor of shape {wanted}")
    shape = tuple(images.shape)
    if images.ndim != dims or shape[-3] not in (1, 3) or 0 in shape[-2:]:
        raise ValueError(f"{key} has the shape {shape}; allowed is {wanted}, channel first, with at least one pixel")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"{key} has the dtype {images.dtype}; allowed is uint8, or floating point in [0, 1]")
    if images.numel() == 0 or not values:
        return
    low, high = torch.aminmax(images.detach())
    low_value, high_value = float(low), float(high)
    if low_value != low_value or high_value != high_value:  # NaN is not equal to itself
        bad = images.isnan().flatten(1).any(1).nonzero().flatten().tolist() if dims == 4 else []
        where = f" (tile {bad[0]} of the batch)" if bad else ""
        raise ValueError(f"{key} holds NaN{where}; allowed are numbers in [0, 1]")
    if low_value < 0.0 or high_value > 1.0:
        raise ValueError(
            f"{key} ranges from {low_value:g} to {high_value:g}; allowed is [0, 1] for floating point: "
            "divide by 255, or give uint8"
        )


def check_masks(masks: Any, images: Tensor, key: str = "masks", values: bool = True) -> Tensor:
    """A mask has its image's batch and size, one channel, and the values 0 and 1 alone.

    Args:
        masks: (..., 1, H, W) or (..., H, W), of any dtype.
        images: (..., C, H, W), already checked.
        key: what to call the masks in a message.
        values: look at the values too, which makes a GPU wait; else what is not 0 is nucleus.

    Returns:
        (..., 1, H, W) bool on the images' device.

    Raises:
        ValueError: where it is not so.
    """
    wanted = (*images.shape[:-3], 1, *images.shape[-2:])
    if not isinstance(masks, Tensor):
        raise ValueError(f"{key} is a {type(masks).__name__}; allowed is a tensor of shape {wanted}")
    if masks.ndim == images.ndim - 1:
        masks = masks.unsqueeze(-3)
    if tuple(masks.shape) != wanted:
        raise ValueError(f"{key} has the shape {tuple(masks.shape)}; allowed is {wanted}, the size of its image")
    if masks.dtype != torch.bool:
        binary = masks != 0
        if values and not torch.equal(binary.to(masks.dtype), masks):
            low, high = (float(v) for v in torch.aminmax(masks.float()))
            raise ValueError(
                f"{key} has other values than 0 and 1 (from {low:g} to {high:g}); allowed are 0 and 1 alone: "
                "compare an instance map or a probability with a threshold first"
            )
        masks = binary
    return to_device(masks, images.device)


def check_valid(valid: Any, batch: int, height: int, width: int, key: str = "valid") -> Tensor | None:
    """The boxes of the real pixels, as (B, 4) numbers within their tiles.

    Args:
        valid: (B, 4), or (4,) for a batch of one: left, top, right and bottom in pixels; None: all pixels are real.
        batch: number of tiles.
        height: of the tiles.
        width: of the tiles.
        key: what to call it in a message.

    Returns:
        (B, 4) float64 on the CPU; None where every tile is real all over.

    Raises:
        ValueError: for another shape, and for a box without a pixel.
    """
    if valid is None:
        return None
    try:
        edges = torch.as_tensor(valid).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{key} is {valid!r}; allowed are left, top, right, bottom of the real pixels") from error
    edges = edges.unsqueeze(0) if edges.ndim == 1 and batch == 1 else edges
    if edges.shape != (batch, 4):
        raise ValueError(f"{key} has the shape {tuple(edges.shape)}; allowed is ({batch}, 4): left, top, right, bottom")
    most = torch.tensor([width, height, width, height], dtype=torch.float64)
    edges = torch.minimum(edges.clamp(min=0.0), most)
    if not bool((edges[:, 2:] > edges[:, :2]).all()):
        raise ValueError(f"{key} holds a box without a pixel; allowed is left < right and top < bottom, in the tile")
    return None if bool((edges[:, :2] == 0).all() and (edges[:, 2:] == most[2:]).all()) else edges


def real_pixels(valid: Tensor, height: int, width: int) -> Tensor:
    """(B, 1, H, W) bool on the CPU: pixels whose middle lies in their tile's box, as :func:`check_valid` gives it."""
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    across = (x >= valid[:, 0:1]) & (x < valid[:, 2:3])
    down = (y >= valid[:, 1:2]) & (y < valid[:, 3:4])
    return (down.unsqueeze(2) & across.unsqueeze(1)).unsqueeze(1)


def stated_mpp(argument: Any, image: Any, item: Any = None) -> Any:
    """The one order in which a transform looks for the micrometres per pixel of an image.

    Args:
        argument: what the transform was given; it goes first.
        image: then a MetaTensor's own ``meta["mpp"]``: a tile cut from a slide is not at the slide's scale.
        item: then what the sample says under its key.

    Returns:
        the first of the three that is there; None where none is.
    """
    own = image.meta.get("mpp") if isinstance(image, MetaTensor) else None
    for value in (argument, own, item):
        if value is not None and not (isinstance(value, str) and value == ""):
            return value
    return None


def check_mpp(mpp: Any, batch: int, key: str = "mpp") -> Tensor:
    """``mpp`` is positive and finite, one for all or one a sample.

    Args:
        mpp: a number, or a tensor of one or ``batch`` elements; micrometres per pixel.
        batch: number of samples.
        key: what to call it in a message.

    Returns:
        (batch,) float32 on the CPU.

    Raises:
        ValueError: where it is missing or not so.
    """
    if mpp is None:
        raise ValueError(
            f"{key} is missing; lengths are given in micrometres, so the micrometres per pixel (> 0) must be known"
        )
    try:
        values = torch.as_tensor(mpp, dtype=torch.float32).detach().cpu().flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{key} is {mpp!r}; allowed are micrometres per pixel, > 0") from error
    if len(values) not in (1, batch):
        raise ValueError(f"{key} has {len(values)} values for {batch} samples; allowed is one for all or one a sample")
    low, high = (float(value) for value in torch.aminmax(values)) if len(values) else (1.0, 1.0)
    if not (low > 0 and high < math.inf):  # NaN is neither
        raise ValueError(f"{key} is {values.tolist()[:4]}; allowed are micrometres per pixel, finite and > 0")
    return values.expand(batch).contiguous()
