"""SR-Transformers and plain ViTs of the usual sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cytossl_monai.networks.nets.sr_transformer import SRTransformer

__all__ = [
    "sr_vit_base",
    "sr_vit_base_stem",
    "sr_vit_small",
    "sr_vit_small_stem",
    "sr_vit_tiny",
    "sr_vit_tiny_stem",
    "vit_small",
]

# As published: of each row the 16 largest scores, iRPE on queries, keys and values, beside absolute positions.
_SR = {
    "rpe": {"method": "product", "mode": "contextual", "on": "qkv"},
    "sparsity": "topk",
    "num_keys": 16,
    "sparse_prefix": True,
    "num_salient": None,  # of routed attention, where it is asked for: both grow with the grid
    "window": None,
}


def _vit(hidden_size: int, num_heads: int, defaults: Mapping[str, Any], arguments: dict[str, Any]) -> SRTransformer:
    settings: dict[str, Any] = {
        "in_channels": 3,
        "img_size": 224,
        "patch_size": 16,
        "hidden_size": hidden_size,
        "mlp_dim": 4 * hidden_size,
        "num_layers": 12,
        "num_heads": num_heads,
        "qkv_bias": True,
        "class_token": True,
        "norm_eps": 1e-6,
    }
    return SRTransformer(**{**settings, **defaults, **arguments})


def sr_vit_tiny(**kwargs: Any) -> SRTransformer:
    """SR-Transformer of ViT-Tiny's size (width 192, 3 heads, 12 layers), patch 16; arguments override."""
    return _vit(192, 3, _SR, kwargs)


def sr_vit_small(**kwargs: Any) -> SRTransformer:
    """SR-Transformer of ViT-Small's size (width 384, 6 heads, 12 layers), patch 16; arguments override."""
    return _vit(384, 6, _SR, kwargs)


def sr_vit_base(**kwargs: Any) -> SRTransformer:
    """SR-Transformer of ViT-Base's size (width 768, 12 heads, 12 layers), patch 16; arguments override."""
    return _vit(768, 12, _SR, kwargs)


# Small views and short runs: a patch's neighbours and the salient patches, which grow with the grid.
_STEM = {
    "rpe": {"method": "product", "mode": "contextual", "on": "k"},
    "sparsity": "routed",
    "num_salient": None,
    "window": None,
    "patch_embedding": "stem",
}


def sr_vit_tiny_stem(**kwargs: Any) -> SRTransformer:
    """`sr_vit_tiny` with a convolutional stem, of stride 16 unless ``patch_size`` says another; arguments override."""
    return _vit(192, 3, _STEM, kwargs)


def sr_vit_small_stem(**kwargs: Any) -> SRTransformer:
    """`sr_vit_small` with a convolutional stem, of stride 16 unless ``patch_size`` says another; arguments override."""
    return _vit(384, 6, _STEM, kwargs)


def sr_vit_base_stem(**kwargs: Any) -> SRTransformer:
    """`sr_vit_base` with a convolutional stem, of stride 16 unless ``patch_size`` says another; arguments override."""
    return _vit(768, 12, _STEM, kwargs)


def vit_small(**kwargs: Any) -> SRTransformer:
    """Dense ViT-Small without iRPE, the baseline: what a plain ViT computes; arguments override."""
    return _vit(384, 6, {}, kwargs)
