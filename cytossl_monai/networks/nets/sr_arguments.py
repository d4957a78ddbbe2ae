"""Arguments of the SR-Transformer as its users give them, brought into one form: of its constructor and of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cytossl_monai.networks.blocks.irpe import RPEConfig

__all__ = [
    "background_settings",
    "check_patch_mask",
    "pair",
    "per_layer",
    "plain_arguments",
    "unseen_patches",
]


def pair(value: Sequence[int] | int, name: str) -> tuple[int, int]:
    """A number for both sides, or two.

    Raises:
        ValueError: for more or fewer than two.
    """
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2:
        raise ValueError(f"{name} must be a number or two; got {value}.")
    return int(both[0]), int(both[1])


def per_layer(value: Any, num_layers: int, name: str) -> list[Any]:
    """One entry a layer: a list as it is, one value for all layers.

    Raises:
        ValueError: for a list of another length.
    """
    if isinstance(value, list | tuple):
        if len(value) != num_layers:
            raise ValueError(f"{name} as a list needs one entry a layer, {num_layers}; got {len(value)}.")
        return list(value)
    return [value] * num_layers


def background_settings(value: bool | float | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Arguments of `foreground_patches` for what ``drop_background`` says; None where nothing is dropped.

    Raises:
        ValueError: for a threshold of 0 or less, or an unknown key.
    """
    if value is None or value is False:
        return None
    if value is True:
        return {}
    if isinstance(value, Mapping):
        unknown = set(value) - {"threshold", "glass", "on_blank"}
        if unknown:
            raise ValueError(f"drop_background does not know {sorted(unknown)}; it takes threshold, glass, on_blank.")
        return dict(value)
    if value <= 0:
        raise ValueError(f"drop_background as a threshold must be above 0; got {value}.")
    return {"threshold": float(value)}


def plain_arguments(value: Any) -> Any:
    """Constructor arguments as plain data, fit for a configuration file and a weights-only checkpoint."""
    if isinstance(value, RPEConfig):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(name): plain_arguments(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_arguments(entry) for entry in value]
    return value


def unseen_patches(mask: Tensor | None, keep: Tensor | None, batch: int, cells: int) -> Tensor | None:
    """(B, N) bool of the patches whose pixels no token may see: masked ones (iBOT), and those not kept (MAE)."""
    if mask is not None:
        check_patch_mask(mask, batch, cells, "mask")
    if keep is None:
        return mask
    if keep.dim() != 2 or keep.shape[0] != batch or keep.dtype != torch.long or not 0 < keep.shape[1] <= cells:
        raise ValueError(
            f"keep must be int64 ({batch}, K) with K from 1 to {cells}; got {keep.dtype} {tuple(keep.shape)}."
        )
    left_out = torch.ones(batch, cells, dtype=torch.bool, device=keep.device).scatter_(1, keep, False)
    return left_out if mask is None else left_out | mask


def check_patch_mask(mask: Tensor, batch: int, cells: int, name: str) -> None:
    """Raise ValueError for a mask of patches that is not bool (batch, cells)."""
    if mask.dtype != torch.bool or mask.shape != (batch, cells):
        raise ValueError(f"{name} must be bool of shape ({batch}, {cells}); got {mask.dtype} {tuple(mask.shape)}.")
