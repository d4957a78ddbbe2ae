"""From a plain ViT to an SR-Transformer, keeping every weight; and reading the weight files that others publish."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import ViT
from torch import Tensor, nn

from cytossl_monai.networks.blocks.patch_embedding import resize_position_embeddings
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.utils.errors import CheckpointError

__all__ = ["LoadReport", "convert_state_dict", "load_vit_weights", "to_sr_transformer"]

# Where training code keeps the encoder inside its checkpoint, best first.
_CONTAINERS = ("teacher", "model", "state_dict", "student", "model_state_dict")
_PREFIXES = ("module.", "backbone.", "encoder.", "network.", "base_encoder.")


@dataclass
class LoadReport:
    """What became of a state dict.

    Attributes:
        loaded: parameters of the network that were filled.
        unused: entries of the file that were not used (heads, decoders, mask tokens), by their names in the file.
        missing: parameters of the network that the file does not have; they keep their values.
        changed: what was changed on the way: resized position embeddings, folded class positions, split bias.
    """

    loaded: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} loaded"]
        for name in ("unused", "missing", "changed"):
            entries = getattr(self, name)
            if entries:
                lines.append(f"{name}: {', '.join(entries)}")
        return "; ".join(lines)


_RENAME = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embedding.patch_embeddings."),
    (re.compile(r"^blocks\.(\d+)\.attn\.proj\."), r"blocks.\1.attn.out_proj."),
    (re.compile(r"^blocks\.(\d+)\.mlp\.fc1\."), r"blocks.\1.mlp.linear1."),
    (re.compile(r"^blocks\.(\d+)\.mlp\.fc2\."), r"blocks.\1.mlp.linear2."),
    (re.compile(r"^blocks\.(\d+)\.ls([12])\.gamma$"), r"blocks.\1.scale\2.gamma"),
    # DINOv2's training code nests blocks in chunks: blocks.0.7.x is block 7.
    (re.compile(r"^blocks\.\d+\.(\d+)\."), r"blocks.\1."),
    (re.compile(r"^(reg_token)$"), "register_tokens"),
)


def _unwrap(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for name in _CONTAINERS:
        if isinstance(state.get(name), Mapping):
            state = state[name]
            break
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    while True:
        prefix = next((p for p in _PREFIXES if any(name.startswith(p + "blocks.") for name in tensors)), None)
        if prefix is None:
            prefix = next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            return tensors
        # Entries beside the encoder (heads of a training checkpoint) keep their names, and turn up as unused.
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}


def _grid_of(count: int, grid: tuple[int, int] | None, name: str) -> tuple[int, int]:
    if grid is not None:
        if grid[0] * grid[1] != count:
            raise CheckpointError(f"{name} has {count} positions, which is not the grid {grid[0]} x {grid[1]}.")
        return grid
    side = math.isqrt(count)
    if side * side != count:
        raise CheckpointError(f"{name} has {count} positions, no square: give the grid it was trained on as 'grid'.")
    return side, side


def convert_state_dict(
    state: Mapping[str, Any], network: SRTransformer, grid: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename a ViT's state dict (timm, DINO, DINOv2, MAE, MONAI or this package's) to `SRTransformer`'s names.

    Position embeddings of another grid are resized (bicubic). timm's and DINO's position of the class token is added to
    the class token, which is the same sum; positions of prefix tokens that timm adds to registers likewise.

    Args:
        state: state dict, or a checkpoint that holds one under ``teacher``, ``model``, ``state_dict`` or ``student``.
        network: the network that will take it.
        grid: rows and columns of the grid of the file's position embeddings; None: square.

    Returns:
        renamed state dict, and what was changed.

    Raises:
        CheckpointError: where position embeddings fit no grid.
    """
    tensors = _unwrap(state)
    changed: list[str] = []
    out: dict[str, Tensor] = {}
    registers = 0
    for name, value in tensors.items():
        new = name
        if name == "register_tokens" or name == "reg_token":
            registers = value.shape[1]
        for pattern, replacement in _RENAME:
            new = pattern.sub(replacement, new)
        out[new] = value
    target = network.patch_embedding.position_embeddings
    position = out.pop("pos_embed", None)
    if position is not None:
        cells = network.patch_embedding.grid[0] * network.patch_embedding.grid[1]
        number = position.shape[1]
        patches = next(
            (number - extra for extra in _extras(number, cells, registers, grid)),
            number - int("cls_token" in out),
        )
        extra = number - patches
        if extra and "cls_token" in out:
            out["cls_token"] = out["cls_token"] + position[:, :1]
            changed.append("position of the class token added to cls_token")
        if extra > 1 and "register_tokens" in out:
            out["register_tokens"] = out["register_tokens"] + position[:, 1:extra]
            changed.append("positions of registers added to register_tokens")
        out["patch_embedding.position_embeddings"] = position[:, extra:]
    name = "patch_embedding.position_embeddings"
    if name in out and out[name].shape[1] != target.shape[1]:
        old = _grid_of(out[name].shape[1], grid, "pos_embed")
        new_grid = network.patch_embedding.grid
        out[name] = resize_position_embeddings(out[name], old, new_grid)
        changed.append(f"position embeddings resized from {old[0]} x {old[1]} to {new_grid[0]} x {new_grid[1]}")
    for name in [name for name in out if "cross_attn." in name]:
        del out[name]
    return out, changed


def _extras(number: int, cells: int, registers: int, grid: tuple[int, int] | None) -> list[int]:
    """How many of ``number`` positions may belong to prefix tokens, likeliest first."""
    wanted = cells if grid is None else grid[0] * grid[1]
    candidates = [1, 0, 1 + registers]
    exact = [extra for extra in candidates if number - extra == wanted]
    square = [extra for extra in candidates if number > extra and math.isqrt(number - extra) ** 2 == number - extra]
    return exact + square


def load_vit_weights(
    network: SRTransformer,
    weights: str | os.PathLike[str] | Mapping[str, Any],
    grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Fill an `SRTransformer` with a ViT's published weights; nothing is downloaded.

    Args:
        network: takes the weights in place. Tables of iRPE stay as they are (zero at the start).
        weights: a state dict or checkpoint, or a local file with one; names of timm, DINO, DINOv2, MAE, MONAI's ViT or
            this package.
        grid: rows and columns that the file's position embeddings are for; None: square.

    Returns:
        exactly what was loaded, not used, missing and changed.

    Raises:
        CheckpointError: where the file is unreadable, of another width, patch or depth, or holds no ViT.
    """
    where = "the state dict"
    if not isinstance(weights, Mapping):
        where = str(weights)
        if not Path(weights).is_file():
            raise CheckpointError(f"{where}: no such file. Give a local file with a ViT's state dict.")
        try:
            weights = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{where}: cannot be read as weights ({error}).") from error
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"{where}: holds {type(weights).__name__}, no state dict.")
    state, changed = convert_state_dict(weights, network, grid)
    own = network.state_dict()
    report = LoadReport(changed=changed)
    fitting: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in own:
            report.unused.append(name)
        elif own[name].shape != value.shape:
            if name.startswith("classification_head"):
                report.unused.append(name)
                continue
            raise CheckpointError(
                f"{where}: {name} is {tuple(value.shape)}, the network has {tuple(own[name].shape)}: another width, "
                "patch size or number of channels. Build the network as the weights were."
            )
        else:
            fitting[name] = value
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    if blocks and blocks != set(range(len(network.blocks))):
        raise CheckpointError(f"{where}: has {len(blocks)} blocks, the network {len(network.blocks)}.")
    if not blocks:
        raise CheckpointError(f"{where}: holds no ViT that is known here (entries such as {sorted(state)[:3]}).")
    forbidden = [name for name in report.unused if name.startswith("blocks.")]
    if forbidden:
        raise CheckpointError(f"{where}: the network has no place for {forbidden[:4]} (layer scale, biases?).")
    network.load_state_dict(fitting, strict=False)
    report.loaded = sorted(fitting)
    report.missing = sorted(set(own) - set(fitting))
    return report


def _arguments_of_state(state: Mapping[str, Tensor], num_heads: int | None) -> dict[str, Any]:
    """Constructor arguments that a ViT's state dict implies; None entries are unknown."""
    names = {re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", name): value for name, value in state.items()}
    projection = names.get("patch_embed.proj.weight", names.get("patch_embedding.patch_embeddings.weight"))
    blocks = {int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
    if projection is None or projection.dim() != 4 or not blocks:
        raise CheckpointError(f"This state dict holds no 2D ViT (entries such as {sorted(state)[:3]}).")
    width = projection.shape[0]
    hidden = names.get("blocks.0.mlp.fc1.weight", names.get("blocks.0.mlp.linear1.weight"))
    if hidden is None:
        raise CheckpointError("This ViT has no plain two-layer MLP (SwiGLU?): it cannot become an SRTransformer.")
    position = names.get("pos_embed", names.get("patch_embedding.position_embeddings"))
    registers = names.get("register_tokens", names.get("reg_token"))
    count = 0 if registers is None else registers.shape[1]
    patch = (int(projection.shape[2]), int(projection.shape[3]))
    has_cls = "cls_token" in names
    img_size = (14 * patch[0], 14 * patch[1])
    if position is not None:
        candidates = [position.shape[1] - extra for extra in (int(has_cls), 0, int(has_cls) + count)]
        side = next((math.isqrt(n) for n in candidates if n > 0 and math.isqrt(n) ** 2 == n), None)
        if side is None:
            raise CheckpointError(f"pos_embed has {position.shape[1]} positions, no square grid: give img_size.")
        img_size = (side * patch[0], side * patch[1])
    if num_heads is None:
        if width % 64:
            raise ValueError(f"A state dict does not say its number of heads, and width {width} is no multiple of 64.")
        num_heads = width // 64  # every published ViT from Tiny to Large, DINO and DINOv2 included
    scale = names.get("blocks.0.ls1.gamma", names.get("blocks.0.scale1.gamma"))
    return {
        "in_channels": int(projection.shape[1]),
        "img_size": img_size,
        "patch_size": patch,
        "hidden_size": width,
        "mlp_dim": int(hidden.shape[0]),
        "num_layers": len(blocks),
        "num_heads": num_heads,
        "qkv_bias": "blocks.0.attn.qkv.bias" in names,
        "pos_embed_type": "none" if position is None else "learnable",
        "class_token": has_cls,
        "num_register_tokens": count,
        "layer_scale": None if scale is None else 1.0,
        "norm_eps": 1e-6,
    }


def _arguments_of_monai(model: ViT) -> dict[str, Any]:
    embedding, block = model.patch_embedding, model.blocks[0]
    kernel = getattr(embedding.patch_embeddings, "kernel_size", None)
    if kernel is None or len(kernel) != 2:
        raise ValueError("to_sr_transformer takes a MONAI ViT with spatial_dims=2 and proj_type='conv'.")
    cells = embedding.position_embeddings.shape[1]
    grid = _grid_of(cells, None, "The ViT's position embedding")
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
    model: nn.Module | Mapping[str, Any],
    rpe: Any = "product",
    sparsity: Any = "routed",
    num_heads: int | None = None,
    **arguments: Any,
) -> SRTransformer:
    """Make an SR-Transformer of a ViT, with all of its weights.

    With ``sparsity="none"`` (or ``topk`` with ``keep_ratio=1``) its outputs equal the ViT's, whatever ``rpe`` is, since
    tables of iRPE start at zero. It is then trained on.

    Args:
        model: a MONAI `ViT` (2D, square grid), a timm ``VisionTransformer``, or a state dict with the names of timm,
            DINO, DINOv2 or MAE.
        rpe: iRPE, see `SRTransformer`.
        sparsity: see `SRTransformer`.
        num_heads: only for a state dict, which does not say it; None: width / 64.
        arguments: further arguments of `SRTransformer`, over what the ViT implies.

    Returns:
        the converted network, in the training mode of ``model``. It has no head, except a MONAI ViT's own.

    Raises:
        CheckpointError: for a state dict that holds no ViT.
        ValueError: for models that cannot be converted exactly.
    """
    if isinstance(model, Mapping):
        state = _unwrap(model)
        implied = _arguments_of_state(state, num_heads)
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
    attention, norm = parts.blocks[0].attn, parts.norm
    changed = [
        name
        for name, part in (
            ("q_norm", getattr(attention, "q_norm", None)),
            ("k_norm", getattr(attention, "k_norm", None)),
            ("norm_pre", getattr(parts, "norm_pre", None)),
        )
        if part is not None and not isinstance(part, nn.Identity)
    ]
    if changed or not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"This VisionTransformer has {changed or ['no final LayerNorm']}: it cannot be converted.")
    state = dict(parts.state_dict())
    if getattr(parts, "no_embed_class", False) and "cls_token" in state:
        # The class token has no position here, so that all positions belong to patches.
        state["pos_embed"] = torch.cat([torch.zeros_like(state["cls_token"]), state["pos_embed"]], dim=1)
    implied = _arguments_of_state(state, int(attention.num_heads))
    rows, cols = parts.patch_embed.grid_size
    implied["img_size"] = (rows * implied["patch_size"][0], cols * implied["patch_size"][1])
    implied["norm_eps"] = norm.eps
    return state, implied
