"""Classifiers as files: architecture, weights, classes, calibration and the encoder that they belong to."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cytossl_monai.networks.mil.base import MILModel
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.utils.errors import CheckpointError
from cytossl_monai.utils.files import atomic_path

__all__ = ["FORMAT", "build_network", "bundle_network", "load_classifier", "require_trained", "save_classifier"]

FORMAT = "cytossl-mil"
VERSION = 1
_PACKAGE = "cytossl_monai.networks."


def build_network(config: Mapping[str, Any]) -> MILModel:
    """Build a network from ``{"_target_": dotted name, **constructor arguments}``.

    Only classes of this package's ``networks.mil`` are built: a checkpoint from elsewhere cannot run other code.

    Raises:
        ValueError: when the name is not such a class, or the arguments do not fit it.
    """
    arguments = dict(config)
    target = str(arguments.pop("_target_", ""))
    module, _, name = target.rpartition(".")
    if not target.startswith(_PACKAGE):
        raise ValueError(f"the network {target!r} is not one of {_PACKAGE}*")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the network {target!r} does not exist: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, MILModel)):
        raise ValueError(f"the network {target!r} is no MILModel")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"the network {target!r} cannot be built: {error}") from error


def network_config(network: MILModel) -> dict[str, Any]:
    """``{"_target_": ..., **config}`` of a network, the inverse of ``build_network``."""
    return {"_target_": f"{type(network).__module__}.{type(network).__qualname__}", **network.config}


def save_classifier(path: str | os.PathLike[str], classifier: MILClassifier) -> Path:
    """Write a classifier, atomically.

    Args:
        path: the file, ``model.pt`` as a rule.
        classifier: what to write; its ``meta`` may hold numbers, text, lists and dicts.

    Returns:
        the path written.
    """
    # No key of the file may bear the name of a weight: monai.bundle.load matches the two by name.
    content = {
        "format": FORMAT,
        "version": VERSION,
        "network": network_config(classifier.network),
        "state_dict": {key: value.detach().cpu().clone() for key, value in classifier.state_dict().items()},
        "classes": list(classifier.classes),
        "target": classifier.target,
        "encoder": dict(classifier.encoder),
        "meta": dict(classifier.meta),
    }
    with atomic_path(path) as partial:
        torch.save(content, partial)
    return Path(path)


def load_classifier(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> MILClassifier:
    """Read a classifier, in ``eval()`` mode.

    Raises:
        CheckpointError: when the file is missing, damaged, no classifier of this package, or its weights do not fit
            its architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"classifier {path} does not exist; train one or give its path")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"classifier {path} is damaged or holds more than weights ({error}); get it again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no MIL classifier of this package"
            + (f" but a {content['format']}" if isinstance(content, dict) and "format" in content else "")
            + "; give the model.pt that training wrote"
        )
    if content.get("version") != VERSION:
        raise CheckpointError(f"classifier {path} has version {content.get('version')}, this package reads {VERSION}")
    try:
        classifier = MILClassifier(
            build_network(content["network"]),
            content["classes"],
            content["target"],
            encoder=content["encoder"],
            meta=content["meta"],
        )
        classifier.load_state_dict(content["state_dict"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"classifier {path}: weights and architecture do not belong together: {error}") from error
    return classifier.to(device).eval()


def bundle_network(
    path: str | os.PathLike[str] | None = None,
    in_features: int = 384,
    classes: Sequence[str] = ("negative", "positive"),
    target: str = "multiclass",
    network: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> MILClassifier:
    """The ``network_def`` of the bundle: the classifier in ``path``, or where there is none an untrained one.

    MONAI checks and exports a bundle's network before any weights are there; ``require_trained`` stops a run that
    would predict with such a network.

    Args:
        path: classifier file; may be absent.
        in_features: width of the features of the untrained network.
        classes: classes of the untrained network.
        target: kind of target of the untrained network.
        network: ``_target_`` and arguments of the untrained network (without in_features and n_outputs); None is
            gated ABMIL.
        device: where to put it.
    """
    if path is not None and Path(path).is_file():
        return load_classifier(path, device)
    from cytossl_monai.networks.mil.targets import n_outputs

    config = dict(network or {"_target_": "cytossl_monai.networks.mil.abmil.ABMIL"})
    built = build_network({**config, "in_features": in_features, "n_outputs": n_outputs(target, len(classes))})
    return MILClassifier(built, classes, target).to(device).eval()


def require_trained(classifier: MILClassifier, path: str | os.PathLike[str]) -> None:
    """Stop before an untrained network predicts anything.

    Raises:
        CheckpointError: when ``classifier`` holds no trained weights.
    """
    if not classifier.trained:
        raise CheckpointError(f"classifier {path} does not exist; train one or give its path")
