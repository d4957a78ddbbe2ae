"""Encoders: a network with its normalisation and pooling, tiles in and one vector a tile out; and their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets.vit import ViT
from torch import Tensor, nn

from cytossl_monai.networks.blocks.background import foreground_patches
from cytossl_monai.networks.build import NETWORKS, network_config, own_arguments
from cytossl_monai.networks.nets.pooling import POOLS, image_size, pool_output
from cytossl_monai.networks.nets.sr_transformer import Features, SRTransformer

__all__ = ["Encoder", "encoder_hash", "encoder_hash_0_1"]

# ImageNet's statistics: what published weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """A network with its own normalisation and pooling: uint8 or [0, 1] tiles in, one vector a tile out.

    Args:
        network: an `SRTransformer`, or any network that gives (B, D), or tokens (B, N, D) as MONAI's `ViT` does.
        pool: ``cls`` (class token), ``mean`` (mean of the patches that were encoded) or ``cls+mean`` (both, 2 D wide).
            Of other networks' tokens the first is the class token where they have ``has_class_token``, and the next
            ones, up to ``num_prefix``, are no patches. Networks that give (B, D) or feature maps (B, D, h, w), which
            are averaged, leave nothing to pool: keep the default.
        mean: of each channel, on the scale [0, 1].
        std: of each channel.
        input_size: side in pixels that the network was trained on: larger images are brought down to it, without
            aliasing; smaller ones (local views) are encoded as they are. None: all are.

    Raises:
        ValueError: for another pool, a side below 1, or ``cls`` where the network has no class token. Where only the
            output shows what the network gives, `forward` raises it.

    Attributes:
        scales: 1, or 2: a tile's vector is then followed by that of its central half, enlarged to the tile's size, as
            LESS reads them. Set it where tiles are embedded; a network is trained with 1.
        meta: what is known beside the weights, plain data: name, tile size, mpp, licence.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        pool: str = "cls",
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        if input_size is not None and input_size < 1:
            raise ValueError(f"input_size must be at least 1 pixel; got {input_size}.")
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}; got {pool!r}.")
        if isinstance(network, SRTransformer) and "cls" in pool and not network.has_class_token:
            raise ValueError(f"pool={pool!r} needs a class token: build the network with class_token=True, or 'mean'.")
        if isinstance(network, ViT) and "cls" in pool and not network.classification:
            raise ValueError(f"pool={pool!r} needs a class token, which MONAI's ViT has not: take pool='mean'.")
        if getattr(network, "gives_vectors", False) and pool != "cls":
            raise ValueError(f"{type(network).__name__} gives one vector a tile: leave pool out; got {pool!r}.")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std need one number a channel, std above 0; got {list(mean)} and {list(std)}.")
        self.network = network
        self.pool = pool
        self.scales = 1
        self.meta: dict[str, Any] = {}
        self.input_size = None if input_size is None else int(input_size)
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).view(1, -1, 1, 1))

    @property
    def embed_dim(self) -> int:
        """Width D of the vectors that `forward` gives: as the network declares it, else found by encoding one image."""
        network, both = self.network, 2 if self.pool == "cls+mean" else 1
        if isinstance(network, SRTransformer):
            return network.embed_dim * both * self.scales
        declared = getattr(network, "embed_dim", None)
        if declared is not None:
            return int(declared) * (both if getattr(network, "has_class_token", False) else 1) * self.scales
        modes = [(module, module.training) for module in self.modules()]
        height, width = image_size(network)
        try:
            with torch.no_grad():
                self.eval()
                out = self(torch.zeros(1, self.mean.shape[1], height, width, device=self.mean.device))
        finally:
            for module, training in modes:
                module.training = training
        return int(out.shape[1])

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

    @property
    def hash(self) -> str:
        """See `encoder_hash`."""
        return encoder_hash(self)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in this module's stead (``ckpt_export`` calls it)."""
        from cytossl_monai.networks.nets.export import ScriptableEncoder

        return ScriptableEncoder(self)

    def normalise(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images as float in [0, 1], and normalised: two (B, 3, H, W) tensors, no larger than ``input_size``.

        Raises:
            ValueError: for another number of channels or a type that is neither uint8 nor float.
        """
        if images.dim() != 4 or images.shape[1] != self.mean.shape[1]:
            raise ValueError(f"Images must be (B, {self.mean.shape[1]}, H, W); got shape {tuple(images.shape)}.")
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise ValueError(f"Images must be uint8 in 0..255 or float in [0, 1]; got {images.dtype}.")
        if self.input_size is not None and min(images.shape[-2:]) > self.input_size:
            shrink = self.input_size / min(images.shape[-2:])
            size = [max(self.input_size, round(side * shrink)) for side in images.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True).clamp(0, 1)
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
            (B, D) float; twice as wide where ``scales`` is 2.
        """
        if self.scales == 1:
            return self._encode(images, foreground)
        height, width = images.shape[-2:]
        top, left = height // 4, width // 4
        centre = images[..., top : height - top, left : width - left]
        centre = centre.float() / 255 if centre.dtype == torch.uint8 else centre
        centre = F.interpolate(centre, size=(height, width), mode="bilinear", align_corners=False).clamp(0, 1)
        return torch.cat([self._encode(images, foreground), self._encode(centre, None)], dim=1)

    def _encode(self, images: Tensor, foreground: Tensor | None) -> Tensor:
        if not isinstance(self.network, SRTransformer):
            return pool_output(self.network(self.normalise(images)[1]), self.pool, self.network)
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


def encoder_hash(encoder: Encoder) -> str:
    """16 hexadecimal digits that tell encoders apart: of architecture, weights (mean and std too) and pooling.

    Weights alone are not the encoder: the same ones give other features with another sparsity, window, number of heads
    or with glass left out. A network that does not keep its arguments in ``.config`` is told by its class and weights.
    """
    config = getattr(encoder.network, "config", None)
    if isinstance(config, Mapping) and type(encoder.network).__name__ in NETWORKS:
        architecture = json.dumps(own_arguments(network_config(encoder.network)), sort_keys=True, default=str)
    else:
        architecture = type(encoder.network).__qualname__
    resized = "" if encoder.input_size is None else f":{encoder.input_size}"
    scales = "" if encoder.scales == 1 else f":{encoder.scales} scales"
    return _weights_hash(encoder, f"{encoder.pool}:{architecture}{resized}{scales}")


def encoder_hash_0_1(encoder: Encoder) -> str:
    """The hash of version 0.1, which did not know the architecture: classifiers of then are known by it."""
    return _weights_hash(encoder, encoder.pool)


def _weights_hash(encoder: Encoder, salt: str) -> str:
    digest = hashlib.sha256(salt.encode())
    for name, value in sorted(encoder.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
