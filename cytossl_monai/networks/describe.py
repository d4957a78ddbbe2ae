"""What a network is, in the few words that a report has room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cytossl_monai.networks.mil.ensemble import MILEnsemble
from cytossl_monai.networks.nets.resnet import SmallResNet
from cytossl_monai.networks.nets.sr_transformer import SRTransformer

__all__ = ["describe_classifier", "describe_network", "short_path"]

_SIZES = {(192, 3): "tiny", (384, 6): "small", (768, 12): "base"}
"""Names of the presets by width and number of heads."""


def describe_network(network: nn.Module) -> str:
    """Class, size and number of weights, such as "SRTransformer tiny, 12 layers, width 192, 5.7 million weights"."""
    config: dict[str, Any] = dict(getattr(network, "config", None) or {})
    words = [type(network).__name__]
    if isinstance(network, SRTransformer):
        size = _SIZES.get((config["hidden_size"], config["num_heads"]))
        words[0] += f" {size}" if size else ""
        layers = config["num_layers"]
        words += ["1 layer" if layers == 1 else f"{layers} layers", f"width {config['hidden_size']}"]
    elif isinstance(network, SmallResNet):
        words = [f"ResNet-{config['depth']}", f"width {config['width']}"]
    weights = sum(parameter.numel() for parameter in network.parameters())
    return ", ".join([*words, f"{weights / 1e6:.1f} million weights"] if weights else words)


def describe_classifier(network: nn.Module) -> str:
    """The method; of an ensemble how many folds of which, such as "5 folds of ABMIL"."""
    if not isinstance(network, MILEnsemble):
        return type(network).__name__
    methods = sorted({type(member).__name__ for member in network.members})
    return f"{len(network.members)} folds of {' and '.join(methods)}"


def short_path(path: str) -> str:
    """A file with the folder that it lies in: what tells one ``model.pt`` from another."""
    return "/".join(Path(path).parts[-2:])
