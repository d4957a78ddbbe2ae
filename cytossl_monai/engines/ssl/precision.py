"""Which number format a machine multiplies matrices in fastest."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["fast_precision"]


def fast_precision(device: torch.device | str) -> Literal["bf16", "fp32"]:
    """``bf16`` where the device multiplies bfloat16 in hardware of its own, else ``fp32``.

    On a CPU that is AMX (Intel since 2023): a training step of the tiny encoder then takes about half the time. Older
    CPUs widen bfloat16 to float32 first and gain nothing.

    Args:
        device: where to train.
    """
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.6 to 2.9 cannot tell
    return "bf16" if ask is not None and ask().get("amx_bf16", False) else "fp32"
