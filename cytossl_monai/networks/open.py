"""The one door to encoders: a file of ours, a card with its weights, a program, or a callable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cytossl_monai.networks.cards import card_encoder, read_card
from cytossl_monai.networks.files import load_encoder
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
from cytossl_monai.networks.nets.program import CallableNetwork, ProgramNetwork, is_program
from cytossl_monai.networks.weight_files import HUB
from cytossl_monai.utils.errors import CheckpointError

__all__ = ["check_made_by", "continued_encoder", "open_encoder"]


def open_encoder(
    encoder: str | os.PathLike[str],
    weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Encoder, dict[str, Any]]:
    """Open any encoder.

    Args:
        encoder: a file that `save_encoder` wrote; a card (``.yaml``); a TorchScript, exported-program (``.pt2``) or
            ONNX file, which gets images in [0, 1] and normalises them itself; or ``package.module:function``.
        weights: the weights' file or folder, for a card.
        device: where to put the encoder.

    Returns:
        the encoder in evaluation mode, and what is known of it: ``name``, and as far as its file or card says
        ``tile_size``, ``mpp``, ``license``, ``commercial``, ``limits``, ``source``, ``citation``.

    Raises:
        CheckpointError: where something is missing or does not fit, saying what to do.
    """
    opened, meta = _open(encoder, weights, device)
    opened.meta = meta
    return opened, meta


def continued_encoder(start_from: str | os.PathLike[str] | None) -> Encoder:
    """An encoder of this package to train on from: its network, weights, normalisation, pooling and input size.

    What was frozen when it was trained (`frozen` of `efficientnet_lite0`) is frozen again. Its ``meta`` carries name
    and licence, which the file of the new run repeats.

    Args:
        start_from: a file that `save_encoder` wrote, such as ``models/model.pt`` of a run or the encoder that ships.

    Raises:
        CheckpointError: where none is given, the file is missing or damaged, or is none whose weights can be trained.
    """
    if start_from is None:
        raise CheckpointError(
            "start_from is not set: give the encoder to train on from (--start_from models/model.pt), or leave "
            "configs/backbone/encoder_file.yaml out to start from nothing."
        )
    if Path(start_from).suffix.lower() in (".yaml", ".yml"):
        raise CheckpointError(
            f"{start_from} is a card: lay configs/backbone/encoder_card.yaml over train.json in place of "
            "encoder_file.yaml, and give --card and --weights."
        )
    encoder, _ = open_encoder(start_from)
    if isinstance(encoder.network, ProgramNetwork | CallableNetwork):
        raise CheckpointError(
            f"{start_from} can be applied but not trained on: its layers are not this package's. Give a model.pt that "
            "pretraining wrote."
        )
    return encoder


def check_made_by(
    known: Mapping[str, Any],
    encoder: str | os.PathLike[str],
    weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> None:
    """Hold features to the encoder that they are said to come from.

    Args:
        known: ``hash``, ``name`` and ``dim`` of the features' encoder; a hash of None fits any encoder of that width.
        encoder: as for `open_encoder`.
        weights: as for `open_encoder`.

    Raises:
        CheckpointError: where it is another, or cannot be opened.
    """
    opened, meta = open_encoder(encoder, weights)
    digest = encoder_hash(opened)
    if known.get("hash") not in (None, digest) or (known.get("hash") is None and known["dim"] != opened.embed_dim):
        raise CheckpointError(
            f"the features were made by {known.get('name') or 'an encoder'} ({known.get('hash') or 'no hash'}, "
            f"{known['dim']} a tile), not by {meta['name']} ({digest}, {opened.embed_dim}) of {encoder}: embed the "
            "slides with this encoder, or name the one that was used."
        )


def _open(
    encoder: str | os.PathLike[str],
    weights: str | os.PathLike[str] | Mapping[str, Any] | None,
    device: str | torch.device,
) -> tuple[Encoder, dict[str, Any]]:
    text, path = str(encoder), Path(encoder)
    if path.suffix.lower() in (".yaml", ".yml"):
        card = read_card(path)
        return card_encoder(card, weights).to(device), card.meta()
    if weights is not None:
        raise CheckpointError(
            f"{text}: weights ({_short(weights)}) are for a card (.yaml); this encoder brings its own. Leave weights "
            "out, or give a card of configs/encoders as the encoder."
        )
    if text.startswith(HUB):
        raise CheckpointError(f"{text}: give a card as the encoder, and this name as its weights.")
    if not path.exists() and ":" in text and all(part.isidentifier() for part in text.replace(":", ".").split(".")):
        return _as_it_is(CallableNetwork(text)).to(device), {"name": text}
    if is_program(path) is not None:
        return _as_it_is(ProgramNetwork(path)).to(device), {"name": path.stem}
    if path.suffix.lower() == ".safetensors" or path.is_dir():
        raise CheckpointError(
            f"{text}: these are weights alone. Give the model's card (configs/encoders/*.yaml) as the encoder and this "
            "as --weights."
        )
    loaded, meta = load_encoder(path, device)
    return loaded, {"name": path.stem, **{key: value for key, value in meta.items() if value not in (None, "")}}


def _as_it_is(network: nn.Module) -> Encoder:
    """An encoder that gives its network images in [0, 1]."""
    return Encoder(network, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).eval()


def _short(weights: Any) -> str:
    return "a state dict" if isinstance(weights, Mapping) else str(weights)
