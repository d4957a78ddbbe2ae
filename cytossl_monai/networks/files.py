"""Files of encoders and classifiers: weights with the plain data that builds them again, and nothing else.

Both kinds are dictionaries that ``torch.load(weights_only=True)`` reads: ``format``, ``version``, ``network`` (class
and arguments, see `cytossl_monai.networks.build`), ``state_dict``, ``meta``, and what the kind needs beside them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cytossl_monai.networks.build import build_network, network_config
from cytossl_monai.networks.lora import has_lora, merge_lora
from cytossl_monai.networks.mil.base import MILModel
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.mil.targets import n_outputs
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.utils.errors import CheckpointError
from cytossl_monai.utils.files import atomic_path, read_torch

__all__ = [
    "CLASSIFIER_FORMAT",
    "ENCODER_FORMAT",
    "VERSION",
    "build_encoder",
    "bundle_network",
    "load_classifier",
    "load_encoder",
    "require_trained",
    "save_classifier",
    "save_encoder",
]

ENCODER_FORMAT, CLASSIFIER_FORMAT = "cytossl-encoder", "cytossl-mil"
VERSION = 1

# What a damaged or made-up file can raise on its way into a network.
_MISFIT = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)


def build_encoder(config: Mapping[str, Any]) -> Encoder:
    """Build an `Encoder` (without weights) from plain data.

    Args:
        config: ``network`` (with ``_target_``, or a module), and optionally ``pool``, ``mean``, ``std``; other keys,
            such as those of an encoder file, are ignored; a ``state_dict`` bounds the network's size.

    Raises:
        ValueError: where something is missing or does not fit.
    """
    if "network" not in config:
        raise ValueError(f"An encoder's configuration needs 'network'; got {sorted(config)}.")
    network = config["network"]
    if not isinstance(network, nn.Module):
        network = build_network(network, weights=config.get("state_dict"))
    settings = {name: config[name] for name in ("pool", "mean", "std", "input_size") if name in config}
    if "state_dict" in config and getattr(network, "gives_vectors", False):
        settings.pop("pool", None)  # files of 0.1 may name one, which did nothing
    return Encoder(network, **settings)


def save_encoder(path: str | os.PathLike[str], encoder: Encoder, meta: Mapping[str, Any] | None = None) -> None:
    """Write an encoder with all that is needed to build it again.

    Args:
        path: file to write; it appears whole or not at all.
        encoder: the encoder.
        meta: plain data to keep beside it, such as name, method, mpp, tile size.

    Raises:
        ValueError: for networks that do not keep their constructor arguments in ``.config``.
    """
    if has_lora(encoder):
        encoder = merge_lora(encoder)
    content = {
        "format": ENCODER_FORMAT,
        "version": VERSION,
        "network": network_config(encoder.network),
        "pool": encoder.pool,
        "input_size": encoder.input_size,
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
        CheckpointError: where the file is missing, damaged, of another kind, its weights do not fit or are not finite.
    """
    content = _read(path, "an encoder", ENCODER_FORMAT)
    try:
        encoder = build_encoder({**content, **content.get("normalisation", {})})
        encoder.load_state_dict(content["state_dict"])
        meta = dict(content["meta"])
    except _MISFIT as error:
        raise CheckpointError(
            f"{path}: the weights do not fit the network named in the file: {_words(error)}"
        ) from error
    return encoder.to(device).eval(), meta


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
        "format": CLASSIFIER_FORMAT,
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
            its architecture or are not finite.
    """
    content = _read(path, "a classifier", CLASSIFIER_FORMAT)
    try:
        network = build_network(content["network"], MILModel, content["state_dict"])
        classes, target = [str(name) for name in content["classes"]], str(content["target"])
        classifier = MILClassifier(network, classes, target, encoder=content["encoder"], meta=content["meta"])  # type: ignore[arg-type]
        classifier.load_state_dict(content["state_dict"])
    except _MISFIT as error:
        raise CheckpointError(
            f"{path}: weights and architecture of the classifier do not belong together: {_words(error)}"
        ) from error
    return classifier.to(device).eval()


def _read(path: str | os.PathLike[str], what: str, kind: str) -> dict[str, Any]:
    """The content of a model file of this format and version, its weights tensors and finite."""
    content = read_torch(path, what)
    if not isinstance(content, dict) or content.get("format") != kind:
        other = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(
            f"{path}: not {what} file" + (f" but a {other}" if isinstance(other, str) else "") + "; give the model.pt "
            f"that {'pretraining' if kind == ENCODER_FORMAT else 'the training of a classifier'} wrote"
        )
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {content.get('version')}; this package reads version {VERSION}")
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: {what} file without weights; copy or make it again")
    broken = [n for n, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise CheckpointError(
            f"{path}: {len(broken)} of its weights are NaN or infinite, {broken[0]} first: its training went wrong; "
            "train it again"
        )
    return content


def _words(error: Exception) -> str:
    """An error in one line."""
    text = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())[:400]


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
    config = dict(network or {"_target_": "cytossl_monai.networks.ABMIL"})
    built = build_network(
        {**config, "in_features": in_features, "n_outputs": n_outputs(target, len(classes))}, MILModel
    )
    return MILClassifier(built, classes, target).to(device).eval()  # type: ignore[arg-type]


def require_trained(classifier: MILClassifier, path: str | os.PathLike[str]) -> None:
    """Stop before an untrained network predicts anything.

    Raises:
        CheckpointError: when ``classifier`` holds no trained weights.
    """
    if not classifier.trained:
        raise CheckpointError(f"classifier {path} does not exist; train one or give its path")
