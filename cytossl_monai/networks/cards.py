"""Encoder cards: what must be known of an encoder that others trained, beside its weights, in one YAML file a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from cytossl_monai.networks.nets.encoder import MEAN, STD, Encoder
from cytossl_monai.networks.nets.pooling import POOLS
from cytossl_monai.networks.nets.program import CallableNetwork, ProgramNetwork
from cytossl_monai.networks.nets.resnet import ResNetFeatures, ResNetV2Features, load_resnet_weights
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.networks.weight_files import HUB, file_sha256, find_weights
from cytossl_monai.networks.weights import load_vit_weights
from cytossl_monai.utils.errors import CheckpointError
from cytossl_monai.utils.files import read_yaml

__all__ = ["ARCHITECTURES", "EncoderCard", "card_encoder", "card_network", "read_card", "wrap_network"]

logger = logging.getLogger(__name__)
ARCHITECTURES = ("vit", "resnet50", "resnet50_v2", "program", "callable")
# What published ViTs have in common; a card says where its model differs.
_VIT = {"in_channels": 3, "qkv_bias": True, "class_token": True, "norm_eps": 1e-6, "rpe": None, "sparsity": "none"}
_said: set[str] = set()


@dataclass(frozen=True)
class EncoderCard:
    """One encoder that others trained.

    Args:
        name: how it is called in files and reports.
        architecture: ``vit``, ``resnet50``, ``resnet50_v2``, ``program`` (TorchScript, exported program, ONNX) or
            ``callable``.
        network: arguments of the network: of `SRTransformer` for a ``vit`` (its number of heads among them).
        tile_size: side of the tiles in pixels.
        mpp: micrometres per pixel of the tiles; None where the authors do not say.
        mean: of each channel, on the scale [0, 1].
        std: of each channel.
        pool: ``cls``, ``mean`` or ``cls+mean``.
        embed_dim: width of the vectors.
        license: under which the weights are given.
        commercial: whether that allows commercial use; None where it is not clear.
        limits: what else is to be heeded, in a sentence.
        gated: the weights are given only after a request.
        source: where the weights are to be had.
        hub: name on the Hugging Face hub, for those who ask for ``hf-hub:``.
        file: the weights' file at the source.
        sha256: of that file, where it is published or was taken from a file that is known to be right.
        citation: the paper.
        positions: how the authors resize position embeddings: ``antialias``, ``offset``.
        registers_first: the file's positions begin with those of the registers.
        callable: ``package.module:function`` for ``architecture: callable``.
        notes: anything else, in sentences.
        path: of the card; not in the file.
    """

    name: str
    architecture: str = "vit"
    network: Mapping[str, Any] = field(default_factory=dict)
    tile_size: int = 224
    mpp: float | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    pool: str = "cls"
    embed_dim: int | None = None
    license: str | None = None
    commercial: bool | None = None
    limits: str | None = None
    gated: bool = False
    source: str | None = None
    hub: str | None = None
    file: str | None = None
    sha256: str | None = None
    citation: str | None = None
    positions: Mapping[str, Any] = field(default_factory=dict)
    registers_first: bool = False
    callable: str | None = None
    notes: str | None = None
    path: str = ""

    @property
    def where_to_get(self) -> str:
        """Where the weights are to be had and under which licence, as a sentence."""
        gate = " after a request for access" if self.gated else ""
        place = f"to be had at {self.source}{gate}" if self.source else "not published at a place that is known here"
        return (
            f"The weights of {self.name} are {place}, under {self.license or 'a licence that the card does not name'}."
        )

    def meta(self) -> dict[str, Any]:
        """What is kept of the card in encoder and feature files: plain data without None."""
        facts = {
            "name": self.name,
            "tile_size": self.tile_size,
            "mpp": self.mpp,
            "license": self.license,
            "commercial": self.commercial,
            "limits": self.limits,
            "source": self.source,
            "citation": self.citation,
        }
        return {key: value for key, value in facts.items() if value is not None}

    def say_licence_once(self) -> None:
        """Log a licence that forbids commercial use, and other limits, once a process."""
        if self.name in _said or (self.commercial is not False and not self.limits):
            return
        _said.add(self.name)
        terms = "not for commercial use" if self.commercial is False else "see its limits"
        logger.warning("%s is under %s: %s. %s", self.name, self.license, terms, self.limits or "")


def read_card(path: str | os.PathLike[str]) -> EncoderCard:
    """Read and check a card.

    Args:
        path: the YAML file.

    Raises:
        CheckpointError: where it is missing, no card, or holds a key or value that is not known.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such card. The cards of published encoders are in configs/encoders.")
    content = read_yaml(path, "the cards of published encoders are in configs/encoders", CheckpointError)
    known = {entry.name for entry in fields(EncoderCard)} - {"path"}
    if not isinstance(content, Mapping) or "name" not in content:
        raise CheckpointError(f"{path}: is no encoder card: it needs at least a name. See configs/encoders.")
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise CheckpointError(f"{path}: does not know {', '.join(unknown)}; a card holds {', '.join(sorted(known))}.")
    facts = dict(content)
    for key in ("network", "positions"):
        if not isinstance(facts.get(key, {}), Mapping):
            raise CheckpointError(f"{path}: {key} must be a dictionary; it is {facts[key]!r}.")
    try:
        for key in ("mean", "std"):
            if key in facts:
                facts[key] = tuple(float(value) for value in facts[key])
        facts["tile_size"] = int(facts.get("tile_size", 224))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: mean, std and tile_size must be numbers ({error}).") from error
    card = EncoderCard(**facts, path=str(path))
    for key, value, allowed in (("architecture", card.architecture, ARCHITECTURES), ("pool", card.pool, POOLS)):
        if value not in allowed:
            raise CheckpointError(f"{path}: {key} must be one of {', '.join(allowed)}; got {value!r}.")
    if card.architecture == "vit" and "num_heads" not in card.network:
        raise CheckpointError(f"{path}: network needs num_heads, which the weights do not say.")
    if card.architecture == "callable" and not card.callable:
        raise CheckpointError(f"{path}: architecture callable needs callable: package.module:function.")
    return card


def card_network(
    card: EncoderCard | str | os.PathLike[str],
    weights: str | os.PathLike[str] | Mapping[str, Any] | None,
    **changes: Any,
) -> nn.Module:
    """The network of a card with its weights: to encode with, or to be trained on.

    Args:
        card: the card or its path.
        weights: file, folder, state dict or ``hf-hub:``; None for ``architecture: callable``, or to build a network
            without weights.
        changes: arguments over the card's, such as ``rpe`` and ``sparsity`` to make an SR-Transformer of a ViT.

    Returns:
        an `SRTransformer`, a ResNet, or a program.

    Raises:
        CheckpointError: where the weights are missing, not those of the card, or the two do not fit together.
    """
    card = card if isinstance(card, EncoderCard) else read_card(card)
    where = card.path or card.name
    try:
        network = _build(card, weights, changes)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: its network cannot be built: {error}") from error
    card.say_licence_once()
    return network


def _build(card: EncoderCard, weights: Any, changes: Mapping[str, Any]) -> nn.Module:
    if card.architecture == "callable":
        assert card.callable is not None
        return CallableNetwork(card.callable, card.embed_dim, {**card.network, **changes})
    if weights is not None and not isinstance(weights, Mapping):
        weights = _checked_file(card, weights)
    if card.architecture == "program":
        if weights is None:
            raise CheckpointError(f"needs its file: give --weights. {card.where_to_get}")
        return ProgramNetwork(weights, card.embed_dim)
    if card.architecture == "vit":
        vit = SRTransformer(**{**_VIT, "img_size": card.tile_size, **card.network, **changes})
        if weights is not None:
            report = load_vit_weights(vit, weights, None, dict(card.positions), card.registers_first)
            missing = [name for name in report.missing if ".irpe." not in name]
            if missing:
                raise CheckpointError(f"the weights lack {', '.join(missing[:8])}, which the network of the card has.")
            logger.info("%s: %s", card.name, report)
        return vit
    network = (ResNetV2Features if card.architecture == "resnet50_v2" else ResNetFeatures)(**card.network, **changes)
    if weights is not None:
        unused = load_resnet_weights(network, weights)
        logger.info("%s: %d loaded; unused: %s", card.name, len(network.state_dict()), ", ".join(unused) or "none")
    return network


def _checked_file(card: EncoderCard, weights: str | os.PathLike[str]) -> Path:
    """The weights' file, refused where its hash is not the card's."""
    if str(weights) == HUB or str(weights) == HUB.rstrip(":"):
        if card.hub is None:
            raise CheckpointError(f"names no model on a hub. {card.where_to_get}")
        weights = HUB + card.hub
    path = find_weights(weights, card.file)
    if card.sha256 is not None:
        digest = file_sha256(path)
        if digest != card.sha256:
            raise CheckpointError(
                f"{path} has the SHA-256 {digest}, not {card.sha256} of the card: another file, or a damaged copy. "
                f"{card.where_to_get}"
            )
    return path


def card_encoder(
    card: EncoderCard | str | os.PathLike[str],
    weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    **changes: Any,
) -> Encoder:
    """The encoder of a card, with its weights, normalisation and pooling, in evaluation mode.

    Args:
        card: the card or its path.
        weights: see `card_network`.
        changes: see `card_network`.

    Raises:
        CheckpointError: as `card_network` does; where weights are needed and not given, it says where they are to be
            had; where the width is not the card's.
    """
    card = card if isinstance(card, EncoderCard) else read_card(card)
    where = card.path or card.name
    if weights is None and card.architecture != "callable":
        raise CheckpointError(
            f"{where}: needs the weights: give their file or folder (--weights). {card.where_to_get} Nothing is "
            "downloaded by itself."
        )
    return wrap_network(card_network(card, weights, **changes), card)


def wrap_network(network: nn.Module, card: EncoderCard | str | os.PathLike[str]) -> Encoder:
    """A network with the normalisation and pooling of a card, in evaluation mode.

    Args:
        network: as `card_network` gives it, or changed since (with LoRA, say).
        card: the card or its path.

    Raises:
        CheckpointError: where the width is not the card's, or its pooling asks for what the network has not.
    """
    card = card if isinstance(card, EncoderCard) else read_card(card)
    where = card.path or card.name
    try:
        encoder = Encoder(network, card.pool, card.mean, card.std)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if card.embed_dim is not None and encoder.embed_dim != card.embed_dim:
        raise CheckpointError(f"{where}: embed_dim is {card.embed_dim}, but the network gives {encoder.embed_dim}.")
    encoder.meta = card.meta()
    return encoder.eval()
