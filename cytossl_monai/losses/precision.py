"""Losses are computed in full precision, whatever autocast does around them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["full_precision", "widen"]

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: switch autocast off inside ``function``.

    Similarities divided by a temperature of 0.04 and an exponential on top do not survive bf16's eight bits. Autocast
    would cast a matrix product back to bf16 even when its operands are float32, so it is switched off, not only cast.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if tensor is None:
            lists = (a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple)) and a)
            tensor = next((a[0] for a in lists if isinstance(a[0], Tensor)), None)
        device_type = "cpu" if tensor is None else tensor.device.type
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def widen(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay what they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
