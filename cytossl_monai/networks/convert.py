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
import torch.nn.functional as F
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
    # DINOv2's training code nests blocks in chunks: blocks.0.7.x is block 7.
    (re.compile(r"^blocks\.\d+\.(\d+)\."), r"blocks.\1."),
    (re.compile(r"^patch_embed\.proj\."), "patch_embedding.patch_embeddings."),
    (re.compile(r"^blocks\.(\d+)\.attn\.proj\."), r"blocks.\1.attn.out_proj."),
    (re.compile(r"^blocks\.(\d+)\.mlp\.fc1\."), r"blocks.\1.mlp.linear1."),
    (re.compile(r"^blocks\.(\d+)\.mlp\.fc2\."), r"blocks.\1.mlp.linear2."),
    (re.compile(r"^blocks\.(\d+)\.ls([12])\.gamma$"), r"blocks.\1.scale\2.gamma"),
    (re.compile(r"^(reg_token)$"), "register_tokens"),
)


def _unwrap(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """The encoder inside a checkpoint.

    Returns:
        tensors without the prefixes of wrappers, the name in the file of each, and the entries beside the encoder.
    """
    inside, beside = "", [name for name, value in state.items() if not isinstance(value, Tensor)]
    for name in _CONTAINERS:
        if isinstance(state.get(name), Mapping):
            inside, beside = name + "/", [other for other in state if other != name]
            state = state[name]
            beside += [inside + other for other, value in state.items() if not isinstance(value, Tensor)]
            break
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    origin = {name: inside + name for name in tensors}
    while True:
        prefix = next((p for p in _PREFIXES if any(name.startswith(p + "blocks.") for name in tensors)), None)
        if prefix is None:
            prefix = next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            return tensors, origin, [str(name) for name in beside]
        # Entries beside the encoder (heads of a training checkpoint) keep their names, and turn up as unused.
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        origin = {name.removeprefix(prefix): file_name for name, file_name in origin.items()}


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
) -> tuple[dict[str, Tensor], LoadReport]:
    """Rename a ViT's state dict (timm, DINO, DINOv2, MAE, MONAI or this package's) to `SRTransformer`'s names.

    Position embeddings of another grid are resized (bicubic). timm's and DINO's position of the class token is added to
    the class token, which is the same sum; positions of prefix tokens that timm adds to registers likewise.

    Args:
        state: state dict, or a checkpoint that holds one under ``teacher``, ``model``, ``state_dict`` or ``student``.
        network: the network that will take it.
        grid: rows and columns of the grid of the file's position embeddings; None: square.

    Returns:
        renamed state dict with those entries only that the network has a place for, and a report in which ``missing``
        and ``loaded`` are not filled in.

    Raises:
        CheckpointError: where position embeddings fit no grid, or the depth or the parts of the blocks differ.
    """
    tensors, origin, beside = _unwrap(state)
    report = LoadReport(unused=beside)
    out: dict[str, Tensor] = {}
    file_name: dict[str, str] = {}
    for name, value in tensors.items():
        new = name
        for pattern, replacement in _RENAME:
            new = pattern.sub(replacement, new)
        out[new] = value
        file_name[new] = origin[name]
    registers = out["register_tokens"].shape[1] if "register_tokens" in out else 0
    target = network.patch_embedding.position_embeddings
    table = "patch_embedding.position_embeddings"
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
            report.changed.append("position of the class token added to cls_token")
        if extra > 1 and "register_tokens" in out:
            out["register_tokens"] = out["register_tokens"] + position[:, 1:extra]
            report.changed.append("positions of registers added to register_tokens")
        out[table] = position[:, extra:]
        file_name[table] = file_name["pos_embed"]
    if table in out and out[table].shape[1] != target.shape[1]:
        old, new_grid = _grid_of(out[table].shape[1], grid, "pos_embed"), network.patch_embedding.grid
        out[table] = resize_position_embeddings(out[table], old, new_grid)
        report.changed.append(f"position embeddings resized from {old[0]} x {old[1]} to {new_grid[0]} x {new_grid[1]}")
    own = network.state_dict()
    blocks = {int(match[1]) for name in out if (match := re.match(r"blocks\.(\d+)\.", name))}
    if not blocks:
        raise CheckpointError(f"holds no ViT that is known here (entries such as {sorted(state)[:3]}).")
    if len(blocks) != len(network.blocks):
        raise CheckpointError(f"has {len(blocks)} blocks, the network {len(network.blocks)}.")
    for name in list(out):
        other_head = name.startswith("classification_head") and own.get(name, out[name]).shape != out[name].shape
        if name not in own or other_head:
            report.unused.append(file_name[name])
            if name.startswith("blocks.") and "cross_attn." not in name:  # MONAI has those and does not use them
                raise CheckpointError(
                    f"the network has no place for {file_name[name]} (layer scale, bias?). Build it alike."
                )
            del out[name]
    return out, report


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
    where, state = _read(weights)
    try:
        fitting, report = convert_state_dict(state, network, grid)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    own = network.state_dict()
    for name, value in fitting.items():
        if own[name].shape != value.shape:
            raise CheckpointError(
                f"{where}: {name} is {tuple(value.shape)}, the network has {tuple(own[name].shape)}: another width, "
                "patch size or number of channels. Build the network as the weights were."
            )
    network.load_state_dict(fitting, strict=False)
    report.loaded = sorted(fitting)
    report.missing = sorted(set(own) - set(fitting))
    return report


def _read(weights: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """How to call the weights in a message, and what they hold."""
    if isinstance(weights, Mapping):
        return "the state dict", weights
    where = str(weights)
    if not Path(weights).is_file():
        raise CheckpointError(f"{where}: no such file. Give a local file with a ViT's state dict.")
    try:
        content = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{where}: cannot be read as weights ({error}).") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where}: holds {type(content).__name__}, no state dict.")
    return where, content


def _arguments_of_state(
    state: Mapping[str, Tensor], num_heads: int | None, img_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Constructor arguments that a ViT's state dict implies; the image's size is guessed where it is not given."""
    names = {re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", name): value for name, value in state.items()}
    projection = names.get("patch_embed.proj.weight", names.get("patch_embedding.patch_embeddings.weight"))
    blocks = {int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
    if projection is None or projection.dim() != 4 or not blocks:
        raise CheckpointError(f"holds no 2D ViT (entries such as {sorted(state)[:3]}).")
    width = projection.shape[0]
    hidden = names.get("blocks.0.mlp.fc1.weight", names.get("blocks.0.mlp.linear1.weight"))
    back = names.get("blocks.0.mlp.fc2.weight", names.get("blocks.0.mlp.linear2.weight"))
    if hidden is None or back is None or back.shape != hidden.shape[::-1]:
        raise CheckpointError("has no plain two-layer MLP (SwiGLU?): it cannot become an SRTransformer.")
    position = names.get("pos_embed", names.get("patch_embedding.position_embeddings"))
    registers = names.get("register_tokens", names.get("reg_token"))
    count = 0 if registers is None else registers.shape[1]
    patch = (int(projection.shape[2]), int(projection.shape[3]))
    has_cls = "cls_token" in names
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
            one) with the names of timm, DINO, DINOv2 or MAE. What a state dict does not say is taken as published for
            these: GELU, layer norms with an epsilon of 1e-6.
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
    state: Mapping[str, Any]
    if isinstance(model, Mapping | str | os.PathLike):
        where, state = _read(model)
        size = arguments.get("img_size")
        try:
            implied = _arguments_of_state(_unwrap(state)[0], num_heads, (size, size) if isinstance(size, int) else size)
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
    if not isinstance(norm, nn.LayerNorm):
        changed.append("no final LayerNorm over its tokens")
    x = torch.linspace(-3, 3, 31)
    if not torch.allclose(parts.blocks[0].mlp.act(x), F.gelu(x), atol=1e-6):
        changed.append(f"the activation {type(parts.blocks[0].mlp.act).__name__}")
    if changed:
        raise ValueError(f"This VisionTransformer has {', '.join(changed)}: it cannot be converted exactly.")
    state = dict(parts.state_dict())
    if getattr(parts, "no_embed_class", False) and "cls_token" in state:
        # The class token has no position here, so that all positions belong to patches.
        state["pos_embed"] = torch.cat([torch.zeros_like(state["cls_token"]), state["pos_embed"]], dim=1)
    (rows, cols), patch = parts.patch_embed.grid_size, parts.patch_embed.patch_size
    implied = _arguments_of_state(state, int(attention.num_heads), (rows * patch[0], cols * patch[1]))
    implied["norm_eps"] = norm.eps
    return state, implied
