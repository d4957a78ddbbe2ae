"""Groups of views joined to a batch, a batch of views cut into pieces, and how small a batch may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cytossl_monai.utils.errors import SettingError

__all__ = ["check_batch", "cut_views", "join_views"]


def join_views(drawn: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join groups of views along the batch."""
    joined: dict[str, Any] = {}
    for key, value in drawn[0].items():
        if key == "kept":  # numbers of tiles within their group; tiles that were left out are counted by the loader
            continue
        if isinstance(value, Tensor):
            joined[key] = torch.cat([group[key] for group in drawn])
        else:
            joined[key] = [torch.cat([group[key][i] for group in drawn]) for i in range(len(value))]
    return joined


def cut_views(views: Mapping[str, Any], pieces: int) -> list[dict[str, Any]]:
    """Cut views along the batch into pieces of the same size, as the mean over pieces needs.

    Raises:
        ValueError: when the batch cannot be cut so.
    """
    size = len(views["global"][0])
    if size % pieces:
        raise ValueError(f"accumulation_steps {pieces} does not divide the batch of {size}")
    share = size // pieces
    cut = []
    for number in range(pieces):
        part = slice(number * share, (number + 1) * share)
        cut.append(
            {k: v[part] if isinstance(v, Tensor) else [element[part] for element in v] for k, v in views.items()}
        )
    return cut


def check_batch(method: nn.Module, sampler: Any) -> None:
    """Refuse to train with batch normalisation on one sample, which has no spread to divide by.

    Args:
        method: what is trained.
        sampler: of the batches; one without ``global_batch_size`` is not judged.

    Raises:
        SettingError: when a batch of all processes is one sample.
    """
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in method.modules())
    if normalised and getattr(sampler, "global_batch_size", None) == 1:
        raise SettingError(
            f"batch_size is 1, and {type(method).__name__} normalises over the batch; give at least 2, and "
            "accumulation_steps to save memory"
        )
