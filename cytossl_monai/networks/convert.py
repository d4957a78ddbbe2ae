"""From a plain ViT to an SR-Transformer, keeping every weight; and reading the weight files that others publish."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import ViT
from torch import Tensor, nn

from cytossl_monai.networks.blocks.gated_mlp import GATES
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.networks.weight_files import read_weights
from cytossl_monai.networks.weights import PROJECTION, grid_of, load_vit_weights, rename_weights
from cytossl_monai.utils.errors import CheckpointError

__all__ = ["to_sr_transformer"]


_KNOWN_HEADS = 1024  # up to this width every published ViT, DINO and DINOv2 included, has heads of 64


def _arguments_of_state(
    state: Mapping[str, Tensor],
    num_heads: int | None,
    img_size: tuple[int, int] | None = None,
    mlp_type: str | None = None,
) -> dict[str, Any]:
    """Constructor arguments that a ViT's weights (under our names) imply; the image's size is guessed if not given."""
    projection = state.get("patch_embedding.patch_embeddings.weight")
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    stem = _arguments_of_stem(state)
    if (stem is None and (projection is None or projection.dim() != 4)) or not blocks:
        raise CheckpointError(f"holds no 2D ViT (entries such as {sorted(state)[:3]}).")
    width = state["norm.weight"].shape[0] if projection is None else projection.shape[0]
    hidden, back = (state.get(f"blocks.0.mlp.linear{layer}.weight") for layer in (1, 2))
    if hidden is None or back is None or hidden.shape[0] not in (back.shape[1], 2 * back.shape[1]):
        raise CheckpointError("has an MLP that is neither two layers nor gated: it cannot become an SRTransformer.")
    gated = hidden.shape[0] != back.shape[1]
    position = state.get("pos_embed", state.get("patch_embedding.position_embeddings"))
    registers = state.get("register_tokens")
    count = 0 if registers is None else registers.shape[1]
    if stem is not None:
        patch = stem["patch_size"]
    else:
        assert projection is not None
        patch = (int(projection.shape[2]), int(projection.shape[3]))
        stem = {"in_channels": int(projection.shape[1]), "patch_size": patch}
    has_cls = "cls_token" in state
    if img_size is None and position is None:
        img_size = (14 * patch[0], 14 * patch[1])
    elif img_size is None:
        assert position is not None
        candidates = [position.shape[1] - extra for extra in (int(has_cls), 0, int(has_cls) + count)]
        side = next((math.isqrt(n) for n in candidates if n > 0 and math.isqrt(n) ** 2 == n), None)
        if side is None:
            raise CheckpointError(f"pos_embed has {position.shape[1]} positions, no square grid: give img_size.")
        img_size = (side * patch[0], side * patch[1])
    if num_heads is None:
        if width % 64 or width > _KNOWN_HEADS:
            raise ValueError(
                f"A state dict does not say its number of heads, and at width {width} it cannot be known (ViT-H has 16 "
                "at 1280, ViT-g 16 or 24): give num_heads, as the model's card does."
            )
        num_heads = width // 64
    return {
        **stem,
        "img_size": img_size,
        "hidden_size": width,
        "mlp_dim": int(back.shape[1]),
        "mlp_type": mlp_type or ("swiglu" if gated else "gelu"),
        "num_layers": len(blocks),
        "num_heads": num_heads,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "pos_embed_type": "none" if position is None else "learnable",
        "class_token": has_cls,
        "num_register_tokens": count,
        "layer_scale": 1.0 if "blocks.0.scale1.gamma" in state else None,
        "norm_eps": 1e-6,
    }


def _arguments_of_stem(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Constructor arguments that a convolutional stem's weights imply, or None where there is no such stem."""
    kernels = {
        int(match[1]): value
        for name, value in state.items()
        if (match := re.fullmatch(rf"{re.escape(PROJECTION)}\.(\d+)\.weight", name)) and value.dim() == 4
    }
    if 0 not in kernels:
        return None
    side = 2 ** (len(kernels) - 1)  # all but the last halve the image
    batch = f"{PROJECTION}.1.running_mean" in state
    return {
        "in_channels": int(kernels[0].shape[1]),
        "patch_size": (side, side),
        "patch_embedding": "stem",
        "stem_norm": "batch" if batch else "group",
    }


def _arguments_of_monai(model: ViT) -> dict[str, Any]:
    embedding, block = model.patch_embedding, model.blocks[0]
    kernel = getattr(embedding.patch_embeddings, "kernel_size", None)
    if kernel is None or len(kernel) != 2:
        raise ValueError("to_sr_transformer takes a MONAI ViT with spatial_dims=2 and proj_type='conv'.")
    cells = embedding.position_embeddings.shape[1]
    grid = grid_of(cells, None, "The ViT's position embedding")
    head = getattr(model, "classification_head", None)
    linear = head[0] if isinstance(head, nn.Sequential) else head
    return {
        "in_channels": embedding.patch_embeddings.in_channels,
        "img_size": (grid[0] * kernel[0], grid[1] * kernel[1]),
        "patch_size": tuple(kernel),
        "hidden_size": embedding.patch_embeddings.out_channels,
        "mlp_dim": block.mlp.linear1.out_features,
        "num_layers": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "pos_embed_type": embedding.pos_embed_type,
        "classification": bool(model.classification),
        "num_classes": linear.out_features if linear is not None else 2,
        "post_activation": "Tanh" if isinstance(head, nn.Sequential) else "none",
        "dropout_rate": block.attn.dropout_rate,
        "qkv_bias": block.attn.qkv.bias is not None,
        "save_attn": block.attn.save_attn,
        "norm_eps": model.norm.eps,
    }


def to_sr_transformer(
    model: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
    rpe: Any = "product",
    sparsity: Any = "routed",
    num_heads: int | None = None,
    **arguments: Any,
) -> SRTransformer:
    """Make an SR-Transformer of a ViT, with all of its weights.

    With ``sparsity="none"`` (or ``topk`` with ``keep_ratio=1``) its outputs equal the ViT's, whatever ``rpe`` is, since
    tables of iRPE start at zero. It is then trained on.

    Args:
        model: a MONAI `ViT` (2D, square grid), a timm ``VisionTransformer``, or a state dict (or a local file with
            or folder with one) with the names of timm, DINO, DINOv2 or MAE. What a state dict does not say is taken as
            published for these: GELU, or SiLU of the first half in a gated MLP (``mlp_type`` changes it), and layer
            norms with an epsilon of 1e-6.
        rpe: iRPE, see `SRTransformer`.
        sparsity: see `SRTransformer`.
        num_heads: only for a state dict, which does not say it; None: width / 64, up to a width of 1024 (ViT-L).
        arguments: further arguments of `SRTransformer`, over what the ViT implies.

    Returns:
        the converted network, in the training mode of ``model``. It has no head, except a MONAI ViT's own.

    Raises:
        CheckpointError: for a state dict that holds no ViT.
        ValueError: for models that cannot be converted exactly.
    """
    state: Mapping[str, Any]
    if isinstance(model, Mapping | str | os.PathLike):
        where, state = read_weights(model)
        size = arguments.get("img_size")
        size = (size, size) if isinstance(size, int) else size
        try:
            implied = _arguments_of_state(rename_weights(state).tensors, num_heads, size, arguments.get("mlp_type"))
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
    elif isinstance(model, ViT):
        state, implied = dict(model.state_dict()), _arguments_of_monai(model)
    elif all(hasattr(model, name) for name in ("patch_embed", "blocks", "norm")):
        state, implied = _from_timm(model)
    else:
        raise ValueError(
            f"to_sr_transformer takes a MONAI ViT, a timm VisionTransformer or a state dict, not "
            f"{type(model).__name__}."
        )
    network = SRTransformer(**{**implied, "rpe": rpe, "sparsity": sparsity, **arguments})
    report = load_vit_weights(network, state)
    lost = [name for name in report.missing if ".irpe." not in name]
    if lost and implied.get("pos_embed_type") == "none":
        lost = [name for name in lost if name != "patch_embedding.position_embeddings"]
    if lost:
        raise CheckpointError(f"The weights lack {lost[:4]}.")
    if isinstance(model, nn.Module):
        parameter = next(model.parameters())
        network.to(parameter.device, parameter.dtype).train(model.training)
    return network


def _from_timm(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A timm VisionTransformer's weights and arguments; refuses variants that compute something else."""
    parts: Any = model
    attention, mlp, norm = parts.blocks[0].attn, parts.blocks[0].mlp, parts.norm
    qk_norms = [part for part in (getattr(attention, name, None) for name in ("q_norm", "k_norm")) if part is not None]
    qk_norms = [part for part in qk_norms if not isinstance(part, nn.Identity)]
    changed = [
        name
        for name, part in (
            ("norm_pre", getattr(parts, "norm_pre", None)),
            ("a norm inside its attention", getattr(attention, "norm", None)),
            ("a norm inside its MLP", getattr(mlp, "norm", None)),
        )
        if part is not None and not isinstance(part, nn.Identity)
    ]
    if not isinstance(norm, nn.LayerNorm):
        changed.append("no final LayerNorm over its tokens")
    if any(not isinstance(part, nn.LayerNorm) or part.eps != norm.eps for part in qk_norms) or len(qk_norms) == 1:
        changed.append("a norm of its queries and keys that is no LayerNorm of the same epsilon")
    mlp_type = _mlp_type(mlp)
    if mlp_type is None:
        changed.append(f"the activation {type(mlp.act).__name__}")
    if changed:
        raise ValueError(f"This VisionTransformer has {', '.join(changed)}: it cannot be converted exactly.")
    state = dict(parts.state_dict())
    if getattr(parts, "no_embed_class", False) and "cls_token" in state:
        # The class token has no position here, so that all positions belong to patches.
        state["pos_embed"] = torch.cat([torch.zeros_like(state["cls_token"]), state["pos_embed"]], dim=1)
    (rows, cols), patch = parts.patch_embed.grid_size, parts.patch_embed.patch_size
    size, tensors = (rows * patch[0], cols * patch[1]), rename_weights(state).tensors
    implied = _arguments_of_state(tensors, int(attention.num_heads), size, mlp_type)
    implied["norm_eps"] = norm.eps
    return state, implied


def _mlp_type(mlp: nn.Module) -> str | None:
    """What a timm MLP computes, found by its activation's values; None for something else."""
    x, act = torch.linspace(-3, 3, 31), mlp.act
    assert callable(act)
    values = act(x)
    if not hasattr(mlp, "gate_last") and not hasattr(mlp, "fc1_g"):
        return "gelu" if torch.allclose(values, F.gelu(x), atol=1e-6) else None
    gate_first = not getattr(mlp, "gate_last", False)
    for kind, (function, first) in GATES.items():
        if first == gate_first and torch.allclose(values, function(x), atol=1e-6):
            return kind
    return None
