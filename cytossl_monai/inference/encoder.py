"""The encoder of the inference bundle: the trained one, or a stand-in that may be exported but never believed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cytossl_monai.networks.files import ENCODER_FORMAT
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny
from cytossl_monai.networks.open import open_encoder
from cytossl_monai.utils.errors import CheckpointError

__all__ = ["bundle_encoder", "require_trained_encoder"]


def bundle_encoder(
    path: str | os.PathLike[str],
    network: nn.Module | None = None,
    device: str | torch.device = "cpu",
    weights: str | os.PathLike[str] | None = None,
    two_scales: bool = False,
) -> Encoder:
    """The ``network_def`` of the bundle: the encoder in ``path``, or where there is none an untrained one.

    MONAI checks and exports a bundle's network before any weights are there; `require_trained_encoder` stops a run
    that would embed with such a network. The encoder takes a whole encoder file as its state dict, too: that is what
    ``ckpt_export`` gives it.

    Args:
        path: any encoder that `open_encoder` opens; a ``.pt`` file may be absent.
        network: the stand-in's network where it is absent; None is ``sr_vit_tiny``.
        device: where to put it.
        weights: the weights' file or folder, where ``path`` is a card.
        two_scales: embed each tile and its centre, as LESS reads them.
    """
    if weights is not None or Path(path).exists() or Path(path).suffix not in (".pt", ".ts"):
        encoder, _ = open_encoder(path, weights, device)
        encoder.trained = True  # type: ignore[assignment]
    else:
        encoder = Encoder(network or sr_vit_tiny()).to(device).eval()
        encoder.trained = False  # type: ignore[assignment]
    encoder.scales = 2 if two_scales else 1
    encoder.source = str(path)  # type: ignore[assignment]
    encoder.register_load_state_dict_pre_hook(_unwrap)
    return encoder


def _unwrap(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Let a whole encoder file pass for its state dict."""
    if state_dict.get("format") == ENCODER_FORMAT and isinstance(state_dict.get("state_dict"), Mapping):
        weights = dict(state_dict["state_dict"])
        state_dict.clear()
        state_dict.update(weights)
    module.trained = True  # type: ignore[assignment]


def require_trained_encoder(encoder: nn.Module) -> None:
    """Stop before an untrained encoder embeds anything.

    Raises:
        CheckpointError: when `bundle_encoder` found no weights.
    """
    if not getattr(encoder, "trained", True):
        source = getattr(encoder, "source", "model.pt")
        raise CheckpointError(f"encoder {source} does not exist; pretrain one or give its path (--encoder)")
