"""Every method at a size for tests, over any encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from cytossl_monai.methods.base import SSLMethod
from cytossl_monai.methods.byol import BYOL
from cytossl_monai.methods.dino import DINO
from cytossl_monai.methods.ibot import IBOT
from cytossl_monai.methods.mae import MAE
from cytossl_monai.methods.moco_v3 import MoCoV3
from cytossl_monai.methods.simclr import SimCLR

HEAD = {"out_dim": 32, "hidden_dim": 32, "bottleneck_dim": 16, "freeze_last_layer": 0.0}
IBOT_HEAD = {**HEAD, "patch_out_dim": 32, "mask_probability": 0.7}

SMALL: dict[str, tuple[Callable[..., SSLMethod], dict[str, Any]]] = {
    "moco_v3": (MoCoV3, {"dim": 16, "hidden_dim": 32}),
    "simclr": (SimCLR, {"dim": 16, "hidden_dim": 32}),
    "byol": (BYOL, {"dim": 16, "hidden_dim": 32, "momentum": 0.9}),
    "dino": (DINO, {**HEAD, "momentum": 0.9}),
    "dino_sinkhorn": (DINO, {**HEAD, "centering": "sinkhorn"}),
    "ibot": (IBOT, {**IBOT_HEAD, "momentum": 0.9}),
    "dinov2": (IBOT, {**IBOT_HEAD, "centering": "sinkhorn", "shared_head": False, "koleo_weight": 0.1}),
    "mae": (MAE, {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}),
    "mae_nuclei": (MAE, {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4, "mask_bias": 2.0}),
}
NEEDS_TOKENS = {"ibot", "dinov2", "mae", "mae_nuclei"}
MULTI_CROP = {"dino", "dino_sinkhorn", "ibot", "dinov2"}


def small_method(name: str, encoder: nn.Module, **changes: Any) -> SSLMethod:
    kind, settings = SMALL[name]
    return kind(encoder, **{**settings, **changes})
