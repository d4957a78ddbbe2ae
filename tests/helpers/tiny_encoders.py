"""Encoders small enough for many steps in a test: stand-ins with the interface of `Encoder`, and a small SR-ViT."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.networks.nets.sr_transformer import SRTransformer

SMALL_VIT = {"in_channels": 3, "img_size": 32, "patch_size": 8, "hidden_size": 24, "mlp_dim": 32, "num_heads": 3}
"""A grid of 4 x 4 patches."""


def small_vit(num_layers: int = 2, class_token: bool = True, **changes: Any) -> SRTransformer:
    """An SR-Transformer of these sizes, dense unless ``changes`` say otherwise."""
    return SRTransformer(**{**SMALL_VIT, "num_layers": num_layers, "class_token": class_token, **changes})


class TinyViT(nn.Module):
    """One-block ViT on patches of 8 px, position-free beyond a sine, with a class token."""

    def __init__(self, width: int = 32, depth: int = 1, patch: int = 8) -> None:
        super().__init__()
        self.embed_dim, self.patch_size, self.pool = width, patch, "cls"
        self.network = nn.Module()
        self.network.patch_embedding = nn.Conv2d(3, width, patch, patch)
        self.network.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.network.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.network.norm = nn.LayerNorm(width)
        self.register_buffer("mean", torch.full((3,), 0.5))
        self.register_buffer("std", torch.full((3,), 0.25))

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size, width // self.patch_size

    def forward_tokens(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        images = (images - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)
        tokens = self.network.patch_embedding(images).flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask[..., None], mask_token.to(tokens.dtype), tokens)
        steps = torch.arange(tokens.shape[1], device=tokens.device)[:, None] / torch.arange(1, tokens.shape[2] + 1)
        tokens = tokens + torch.sin(steps)
        if keep is not None:
            tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([self.network.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.network.blocks:
            tokens = block(tokens)
        tokens = self.network.norm(tokens)
        return tokens[:, 0], tokens[:, 1:]

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_tokens(images)[0]


class TinyConv(nn.Module):
    """Two convolutions with batch normalisation: an encoder without tokens."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed_dim = width
        self.network = nn.Sequential(
            nn.Conv2d(3, 12, 5, 4, 2), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, width, 3, 2, 1), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.network(images), 1).flatten(1)

    def forward_tokens(self, images: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("TinyConv has no tokens")


class TinyEncoder(nn.Module):
    """Patches, one mixing layer with dropout (so that the random state counts), a mean."""

    embed_dim = 16

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, 16, 6, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 16)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 255
        images = images.to(self.patch_embedding.weight.dtype)
        tokens = self.patch_embedding(images - 0.5).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.norm(tokens.mean(1))


def coloured_views(batch: int = 8, size: int = 32, seed: int = 0, views: int = 2, local: int = 0) -> dict[str, list]:
    """Views of images that differ in colour and texture; the views of one image differ by noise."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(batch, 3, 4, 4, generator=generator)

    def view(side: int) -> Tensor:
        image = F.interpolate(base, size=(side, side), mode="bilinear")
        return (image + 0.1 * torch.randn(image.shape, generator=generator)).clamp(0, 1)

    nuclei = torch.zeros(batch, 1, size, size, dtype=torch.bool)
    nuclei[:, :, : size // 2, : size // 4] = True
    return {
        "global": [view(size) for _ in range(views)],
        "local": [view(size // 2) for _ in range(local)],
        "nuclei": [nuclei.clone() for _ in range(views)],
    }
