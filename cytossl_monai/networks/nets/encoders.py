"""Encoders: a network with its normalisation and pooling, tiles in and one vector a tile out; and their files."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from torch import Tensor, nn

from cytossl_monai.networks.blocks.background import foreground_patches
from cytossl_monai.networks.nets.sr_transformer import Features, SRTransformer
from cytossl_monai.utils.errors import CheckpointError
from cytossl_monai.utils.files import atomic_path

__all__ = [
    "Encoder",
    "build_encoder",
    "build_network",
    "encoder_hash",
    "load_encoder",
    "network_config",
    "resnet50",
    "save_encoder",
]

FORMAT, VERSION = "cytossl-encoder", 1
POOLS = ("cls", "mean", "cls+mean")
# ImageNet's statistics: what published weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A checkpoint names the class that it is for. Only networks may be built from one, never anything else.
_TARGETS = ("cytossl_monai.networks.", "monai.networks.nets.")


class ResNetFeatures(ResNet):
    """MONAI's 2D ResNet-50 with the layout of torchvision's, giving the pooled features.

    Its parameters are torchvision's key for key, ``fc`` included or not.

    Args:
        in_channels: channels of the image.
        num_classes: 0 for features (B, 2048); above, a last linear layer ``fc`` as torchvision's and logits.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 0) -> None:
        super().__init__(
            ResNetBottleneck,
            [3, 4, 6, 3],
            [64, 128, 256, 512],
            spatial_dims=2,
            n_input_channels=in_channels,
            conv1_t_size=7,
            conv1_t_stride=2,
            no_max_pool=False,
            shortcut_type="B",
            num_classes=max(1, num_classes),
            feed_forward=num_classes > 0,
            bias_downsample=False,
        )
        self.config: dict[str, Any] = {"in_channels": in_channels, "num_classes": num_classes}
        self.embed_dim = num_classes or 2048


def resnet50(
    in_channels: int = 3, num_classes: int = 0, weights: str | os.PathLike[str] | None = None
) -> ResNetFeatures:
    """ResNet-50, the convolutional baseline.

    Args:
        in_channels: channels of the image.
        num_classes: 0 for features (B, 2048).
        weights: local file with a state dict of torchvision's ResNet-50 (ImageNet); nothing is downloaded.

    Raises:
        CheckpointError: where the file does not fit, with the names that do not.
    """
    network = ResNetFeatures(in_channels, num_classes)
    if weights is not None:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{weights}: no such file. Give a state dict of torchvision's ResNet-50.") from error
        own = network.state_dict()
        state = {name: value for name, value in state.items() if name in own or not name.startswith("fc.")}
        wrong = sorted(set(own) ^ set(state))
        wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
        if wrong:
            raise CheckpointError(f"{weights}: not a ResNet-50 of torchvision's layout; differs in {wrong[:5]}.")
        network.load_state_dict(state)
    return network


class Encoder(nn.Module):
    """A network with its own normalisation and pooling: uint8 or [0, 1] tiles in, one vector a tile out.

    Args:
        network: an `SRTransformer`, or any network that gives (B, D), or tokens (B, N, D) as MONAI's `ViT` does.
        pool: ``cls`` (class token), ``mean`` (mean of the patches that were encoded) or ``cls+mean`` (both, 2 D wide).
            Networks that give (B, D) by themselves are taken as they are.
        mean: of each channel, on the scale [0, 1].
        std: of each channel.

    Raises:
        ValueError: for another pool, or ``cls`` where the network has no class token.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        pool: str = "cls",
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}; got {pool!r}.")
        if isinstance(network, SRTransformer) and "cls" in pool and not network.has_class_token:
            raise ValueError(f"pool={pool!r} needs a class token: build the network with class_token=True, or 'mean'.")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std need one number a channel, std above 0; got {list(mean)} and {list(std)}.")
        self.network = network
        self.pool = pool
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).view(1, -1, 1, 1))

    @property
    def embed_dim(self) -> int:
        """Width D of the vectors that `forward` gives."""
        if isinstance(self.network, SRTransformer):
            return self.network.embed_dim * (2 if self.pool == "cls+mean" else 1)
        width = getattr(self.network, "embed_dim", None)
        if width is None:
            with torch.no_grad():
                was_training = self.training
                self.eval()
                side = int(self.patch_size) * 4 if hasattr(self.network, "patch_embedding") else 64
                width = self(torch.zeros(1, self.mean.shape[1], side, side, device=self.mean.device)).shape[1]
                self.train(was_training)
        return int(width)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels.

        Raises:
            ValueError: for networks without patches.
        """
        return self._tokens_network().patch_size[0]

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image; ValueError for networks without patches."""
        return self._tokens_network().grid_size(height, width)

    def _tokens_network(self) -> SRTransformer:
        if not isinstance(self.network, SRTransformer):
            raise ValueError(f"{type(self.network).__name__} gives no patch tokens: use an SRTransformer (any sr_vit).")
        return self.network

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in this module's stead (``ckpt_export`` calls it)."""
        from cytossl_monai.networks.nets.export import ScriptableEncoder

        return ScriptableEncoder(self)

    def normalise(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images as float in [0, 1], and normalised: two (B, 3, H, W) tensors.

        Raises:
            ValueError: for another number of channels or a type that is neither uint8 nor float.
        """
        if images.dim() != 4 or images.shape[1] != self.mean.shape[1]:
            raise ValueError(f"Images must be (B, {self.mean.shape[1]}, H, W); got shape {tuple(images.shape)}.")
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise ValueError(f"Images must be uint8 in 0..255 or float in [0, 1]; got {images.dtype}.")
        return images, (images - self.mean) / self.std

    def _features(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        keep: Tensor | None = None,
        foreground: Tensor | None = None,
    ) -> Features:
        network = self._tokens_network()
        plain, normed = self.normalise(images)
        if foreground is None and keep is None and network.drop_background is not None:
            foreground = foreground_patches(plain, network.patch_size, **network.drop_background)
        return network.forward_features(normed, mask, mask_token, keep, foreground)

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> Tensor:
        """Encode tiles.

        Args:
            images: (B, 3, H, W) uint8, or float in [0, 1].
            foreground: (B, N) bool of the patches to encode, or None (see `SRTransformer.forward`).

        Returns:
            (B, D) float.
        """
        if not isinstance(self.network, SRTransformer):
            out = self.network(self.normalise(images)[1])
            out = out[0] if isinstance(out, tuple) else out
            return out.mean(dim=1) if out.dim() == 3 else out.flatten(1)
        features = self._features(images, foreground=foreground)
        if self.pool == "cls":
            return features.cls
        if features.foreground is None:
            mean = features.patches.mean(dim=1)
        else:
            mean = features.patches.sum(dim=1) / features.foreground.sum(dim=1, keepdim=True)
        return mean if self.pool == "mean" else torch.cat([features.cls, mean], dim=1)

    def forward_tokens(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Class token and patch tokens, for methods that work on patches.

        Args:
            images: (B, 3, H, W) uint8, or float in [0, 1].
            mask: (B, N) bool: patch embeddings replaced by ``mask_token`` before positions are added (iBOT).
            mask_token: (D,).
            keep: (B, K) int64: encode these patches only (MAE).

        Returns:
            (B, D) and (B, N, D), or (B, K, D) with ``keep``.

        Raises:
            ValueError: for networks without tokens, and masks of another shape.
        """
        features = self._features(images, mask, mask_token, keep)
        return features.cls, features.patches


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


def encoder_hash(encoder: Encoder) -> str:
    """16 hexadecimal digits that tell encoders apart: of all weights (mean and std too) and the pooling."""
    digest = hashlib.sha256(encoder.pool.encode())
    for name, value in sorted(encoder.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


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
