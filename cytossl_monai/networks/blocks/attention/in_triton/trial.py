"""When kernels of our own in Triton are used: where they are asked for, and where they were seen to be right."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from cytossl_monai.utils.errors import first_line

__all__ = ["constant_in_graphs", "exporting", "has_triton", "tried", "triton_asked"]

Function = TypeVar("Function", bound=Callable[..., Any])

TOLERANCE = 0.03  # bfloat16 has 8 bits, and sums of many numbers lose some


def triton_asked(tensor: Tensor) -> bool:
    """Whether ``CYTOSSL_TRITON_ATTENTION=1`` is set and Triton can run on this tensor: CUDA, 16 bits a number.

    Under autocast the dtype that counts is autocast's.
    """
    if os.environ.get("CYTOSSL_TRITON_ATTENTION", "0") != "1" or not tensor.is_cuda:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else tensor.dtype
    return dtype in (torch.bfloat16, torch.float16) and has_triton(tensor.device.index)


@lru_cache(maxsize=16)
def has_triton(device: int | None) -> bool:
    """Whether Triton is installed and the GPU new enough for it (compute capability 8.0)."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def constant_in_graphs(function: Function) -> Function:
    """Let ``torch.compile`` run a function once, as it is, and not look into it.

    What `torch.compiler.assume_constant_result` does, without its import of the compiler: a second of every start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def exporting() -> bool:
    """Whether a graph is being exported, which must need nothing of this package."""
    # A PyTorch that cannot tell compiling from exporting (2.6) is taken to export.
    in_export = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or in_export()


def tried(
    name: str, device: torch.device, attempt: Callable[[], list[tuple[Tensor, Tensor]]], logger: logging.Logger
) -> bool:
    """Whether kernels can be built here and are right: ones that fail or are wrong must not end, or spoil, a training.

    Args:
        name: of the kernels, for the warning.
        device: where they run.
        attempt: runs them on something small, forward and backward; returns pairs of what they gave and what is right
            in float32. They may be no farther apart than `TOLERANCE` of the right one's length.
        logger: gets the warning.
    """
    try:
        # Also where the first image is only encoded: `inference_mode` would leave nothing to go backward through.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            apart = [(got.float() - right).norm() / right.norm() for got, right in attempt()]
            difference = float(torch.stack(apart).detach().max()) if apart else 0.0  # NaN where one is
    except Exception as error:  # noqa: BLE001 - a compiler's errors are of no one kind
        reason = first_line(error)
    else:
        if difference <= TOLERANCE:
            return True
        reason = f"its results are off by {100 * difference:.0f} %"
    logger.warning("%s cannot be used here (%s): a slower path is taken", name, reason)
    return False
