"""Networks from plain data: the one place where a name in a file becomes a class, and only a listed one.

A model file comes from anywhere. What it names is looked up in `NETWORKS`, never imported by its path, and what it
gives as arguments is checked before anything is built: plain data, under names that the class has, and no number larger
than its own weights can explain. So nothing in a file runs code, reads or writes another file or fills the memory.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["NETWORKS", "build_network", "network_config", "own_arguments"]

_OWN = "cytossl_monai.networks."

NETWORKS: dict[str, str] = {
    "SRTransformer": _OWN + "nets.sr_transformer",
    "EfficientNetLite": _OWN + "nets.efficientnet_lite",
    "ResNetFeatures": _OWN + "nets.resnet",
    "ResNetV2Features": _OWN + "nets.resnet",
    "SmallResNet": _OWN + "nets.resnet",
    "ABMIL": _OWN + "mil.abmil",
    "CLAM": _OWN + "mil.clam",
    "DSMIL": _OWN + "mil.dsmil",
    "DTFDMIL": _OWN + "mil.dtfd",
    "LESS": _OWN + "mil.cytology.less",
    "CellDiscriminant": _OWN + "mil.cytology.discriminant",
    "DeepSVDD": _OWN + "mil.cytology.svdd",
    "ReferenceBank": _OWN + "mil.cytology.reference",
    "TransMIL": _OWN + "mil.transmil",
    "MeanMIL": _OWN + "mil.pooling",
    "MaxMIL": _OWN + "mil.pooling",
    "MONAIHead": _OWN + "mil.monai_heads",
    "MONAIPyramidHead": _OWN + "mil.monai_heads",
    "MILEnsemble": _OWN + "mil.ensemble",
    # MONAI's, by their classes: its factories can download weights.
    "ViT": "monai.networks.nets.vit",
    "DenseNet": "monai.networks.nets.densenet",
}
"""Class name -> module. A new network that is to be kept in files is added here."""

_PREFIXES = (_OWN, "monai.networks.nets.")
_SMALL = 4096
_PLAIN = (bool, int, float, str, type(None))


def network_config(network: nn.Module) -> dict[str, Any]:
    """The configuration (``_target_`` and arguments) that builds a network again.

    Raises:
        ValueError: for networks that do not keep their arguments in ``.config``.
    """
    config = getattr(network, "config", None)
    if not isinstance(config, Mapping):
        raise ValueError(f"{type(network).__name__} does not keep its constructor arguments in .config.")
    return {"_target_": f"{type(network).__module__}.{type(network).__name__}", **config}


def own_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the arguments that are the class's defaults: what makes this network this network.

    An argument that a later version adds, with a default that changes nothing, leaves it as it is.
    """
    name, arguments = _split(config)
    defaults = {p.name: p.default for p in inspect.signature(_class(name)).parameters.values()}
    kept = {k: v for k, v in arguments.items() if k not in defaults or _plain_lists(defaults[k]) != _plain_lists(v)}
    return {"network": name, **kept}


def build_network(
    config: Mapping[str, Any], base: type[nn.Module] = nn.Module, weights: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a network from ``_target_`` and arguments.

    Args:
        config: ``{"_target_": dotted name, **constructor arguments}``; of the name, the last part counts.
        base: what it must be.
        weights: the state dict that it is built for, where there is one: arguments are held to its size.

    Raises:
        ValueError: when the name is not a listed network, is no ``base``, or the arguments do not fit.
    """
    name, arguments = _split(config)
    cls = _class(name)
    if not issubclass(cls, base):
        raise ValueError(f"the network {name!r} is no {base.__name__}")
    most = _SMALL if weights is None else max(_SMALL, sum(v.numel() for v in weights.values() if hasattr(v, "numel")))
    _check_plain(name, arguments, most if weights is not None else None)
    try:
        inspect.signature(cls).bind(**arguments)
        return cls(**arguments)
    except (TypeError, AttributeError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"the network {name!r} cannot be built: {error}") from error


def _split(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class's name and the arguments."""
    if not isinstance(config, Mapping):
        raise ValueError(f"_target_ must name a network; got {type(config).__name__} in place of a configuration")
    arguments = dict(config)
    target = arguments.pop("_target_", None)
    if not isinstance(target, str) or not target.startswith(_PREFIXES):
        raise ValueError(f"_target_ must name a network ({' or '.join(p + '*' for p in _PREFIXES)}); got {target!r}.")
    name = target.rpartition(".")[2]
    if name not in NETWORKS:
        raise ValueError(f"_target_ {target!r} does not exist among the networks of files: {', '.join(NETWORKS)}.")
    return name, arguments


def _class(name: str) -> type[nn.Module]:
    cls = getattr(importlib.import_module(NETWORKS[name]), name)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"{name} is no network")
    return cls


def _plain_lists(value: Any) -> Any:
    """Tuples as lists: a file gives back the one for the other."""
    if isinstance(value, list | tuple):
        return [_plain_lists(element) for element in value]
    if isinstance(value, Mapping):
        return {key: _plain_lists(element) for key, element in value.items()}
    return value


def _check_plain(name: str, value: Any, most: int | None, depth: int = 0) -> None:
    """Arguments are plain data, not deep, and no whole number is out of proportion."""
    if depth > 6:
        raise ValueError(f"the network {name!r} has arguments nested too deeply")
    if isinstance(value, Mapping):
        for key, element in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the network {name!r} has an argument without a name: {key!r}")
            _check_plain(name, element, most, depth + 1)
    elif isinstance(value, list | tuple):
        for element in value:
            _check_plain(name, element, most, depth + 1)
    elif isinstance(value, nn.Module):
        pass  # from Python, never from a file: files are read as plain data
    elif not isinstance(value, _PLAIN):
        raise ValueError(f"the network {name!r} has an argument that is no plain data: {type(value).__name__}")
    elif most is not None and isinstance(value, int) and abs(value) > most:
        raise ValueError(f"the network {name!r} has an argument of {value:,}, more than its {most:,} weights")
