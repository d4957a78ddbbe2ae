"""One vector an image from whatever a network gives: tokens, feature maps or vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.blocks.patchembedding import PatchEmbeddingBlock
from torch import Tensor, nn

__all__ = ["POOLS", "image_size", "pool_output"]

POOLS = ("cls", "mean", "cls+mean")


def pool_output(out: Tensor | Sequence[Tensor], pool: str, network: nn.Module) -> Tensor:
    """One vector an image from what a network gives that is no `SRTransformer`.

    Args:
        out: vectors (B, D), feature maps (B, D, h, w) or tokens (B, N, D); or a tuple that begins with one of these.
        pool: as for `Encoder`.
        network: what gave it; its ``has_class_token`` and ``num_prefix`` say what the first tokens are.

    Returns:
        (B, D), or (B, 2 D) for ``cls+mean``.

    Raises:
        ValueError: where the pool asks for what is not there.
    """
    first = out[0] if isinstance(out, (tuple, list)) else out
    assert isinstance(first, Tensor)
    name = type(network).__name__
    if first.dim() != 3:
        if pool != "cls":
            raise ValueError(f"{name} gives {tuple(first.shape)}, no tokens: leave pool out; got {pool!r}.")
        return first.flatten(2).mean(dim=2) if first.dim() > 2 else first
    has_class_token = bool(getattr(network, "has_class_token", False))
    prefix = int(getattr(network, "num_prefix", has_class_token))
    if "cls" in pool and not has_class_token:
        raise ValueError(f"{name} gives tokens and says of no class token (has_class_token): take pool='mean'.")
    mean = first[:, prefix:].mean(dim=1)
    return {"cls": first[:, 0], "mean": mean, "cls+mean": torch.cat([first[:, 0], mean], dim=1)}[pool]


def image_size(network: nn.Module) -> tuple[int, int]:
    """Rows and columns of an image that a network takes: what it declares, of a MONAI `ViT` its own, of others 64."""
    declared = getattr(network, "image_size", None)
    if declared is not None:
        return int(declared[0]), int(declared[1])
    embedding = getattr(network, "patch_embedding", None)
    if not isinstance(embedding, PatchEmbeddingBlock):
        return 64, 64
    projection = embedding.patch_embeddings
    if isinstance(projection, nn.Conv2d):
        patch = int(projection.kernel_size[0])
    else:
        patch = math.isqrt(embedding.patch_dim // 3)
    side = math.isqrt(embedding.n_patches)
    return side * patch, embedding.n_patches // side * patch
