"""Files of encoders: weights with the configuration that builds them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.utils.errors import CheckpointError
from cytossl_monai.utils.files import atomic_path

__all__ = ["FORMAT", "VERSION", "build_encoder", "build_network", "load_encoder", "network_config", "save_encoder"]

FORMAT, VERSION = "cytossl-encoder", 1


# A checkpoint names the class that it is for. Only networks may be built from one, never anything else.
_TARGETS = ("cytossl_monai.networks.", "monai.networks.nets.")


def network_config(network: nn.Module) -> dict[str, Any]:
    """The bundle configuration (``_target_`` and arguments) that builds a network again.

    Raises:
        ValueError: for networks that do not keep their arguments in ``.config``.
    """
    config = getattr(network, "config", None)
    if not isinstance(config, Mapping):
        raise ValueError(f"{type(network).__name__} does not keep its constructor arguments in .config.")
    return {"_target_": f"{type(network).__module__}.{type(network).__name__}", **config}


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """Build a network from ``_target_`` and arguments.

    Raises:
        ValueError: for a target that is no network of this package or of MONAI.
    """
    arguments = dict(config)
    target = arguments.pop("_target_", None)
    if not isinstance(target, str) or not target.startswith(_TARGETS):
        raise ValueError(f"_target_ must name a network ({' or '.join(p + '*' for p in _TARGETS)}); got {target!r}.")
    module_name, _, name = target.rpartition(".")
    try:
        make = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"_target_ {target!r} does not exist: {error}.") from error
    network = make(**arguments)
    if not isinstance(network, nn.Module):
        raise ValueError(f"_target_ {target!r} builds no network.")
    return network


def build_encoder(config: Mapping[str, Any]) -> Encoder:
    """Build an `Encoder` (without weights) from plain data.

    Args:
        config: ``network`` (with ``_target_``, or a module), and optionally ``pool``, ``mean``, ``std``; other keys,
            such as those of an encoder file, are ignored.

    Raises:
        ValueError: where something is missing or does not fit.
    """
    if "network" not in config:
        raise ValueError(f"An encoder's configuration needs 'network'; got {sorted(config)}.")
    network = config["network"]
    if not isinstance(network, nn.Module):
        network = build_network(network)
    return Encoder(network, **{name: config[name] for name in ("pool", "mean", "std") if name in config})


def save_encoder(path: str | os.PathLike[str], encoder: Encoder, meta: Mapping[str, Any] | None = None) -> None:
    """Write an encoder with all that is needed to build it again.

    Args:
        path: file to write; it appears whole or not at all.
        encoder: the encoder.
        meta: plain data to keep beside it, such as name, method, mpp, tile size.

    Raises:
        ValueError: for networks that do not keep their constructor arguments in ``.config``.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "network": network_config(encoder.network),
        "pool": encoder.pool,
        # Not "mean" and "std": monai.bundle.load would take them for the weights of that name.
        "normalisation": {"mean": encoder.mean.flatten().tolist(), "std": encoder.std.flatten().tolist()},
        "state_dict": {name: value.detach().cpu() for name, value in encoder.state_dict().items()},
        "meta": dict(meta or {}),
    }
    with atomic_path(path) as partial:
        torch.save(content, partial)


def load_encoder(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[Encoder, dict[str, Any]]:
    """Read an encoder that `save_encoder` wrote.

    Args:
        path: the file.
        device: where to put the encoder.

    Returns:
        the encoder in evaluation mode, and the ``meta`` it was saved with.

    Raises:
        CheckpointError: where the file is missing, damaged, of another kind, or its weights do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Give an encoder file written by save_encoder.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as an encoder file ({error}). Copy or write it again."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not an encoder file. Write one with save_encoder.")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {content.get('version')}; this package reads version {VERSION}.")
    try:
        encoder = build_encoder({**content, **content.get("normalisation", {})})
        encoder.load_state_dict(content["state_dict"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the weights do not fit the network named in the file: {error}") from error
    return encoder.to(device).eval(), content["meta"]
