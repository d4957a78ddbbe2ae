"""Published ViT weights: names, positions and grids made ours, with a report of what was used."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cytossl_monai.networks.blocks.patch_embedding import resize_position_embeddings
from cytossl_monai.networks.blocks.stem import ConvolutionalStem
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.networks.weight_files import read_weights
from cytossl_monai.utils.errors import CheckpointError

__all__ = ["LoadReport", "NamedWeights", "convert_state_dict", "grid_of", "load_vit_weights", "rename_weights"]

# Where training code keeps the encoder inside its checkpoint, best first.
_CONTAINERS = ("teacher", "model", "state_dict", "student", "model_state_dict")


PROJECTION = "patch_embedding.patch_embeddings"
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
    # DINOv2's fused SwiGLU.
    (re.compile(r"^blocks\.(\d+)\.mlp\.w12\."), r"blocks.\1.mlp.linear1."),
    (re.compile(r"^blocks\.(\d+)\.mlp\.w3\."), r"blocks.\1.mlp.linear2."),
    (re.compile(r"^blocks\.(\d+)\.ls([12])\.gamma$"), r"blocks.\1.scale\2.gamma"),
    (re.compile(r"^blocks\.(\d+)\.gamma_([12])$"), r"blocks.\1.scale\2.gamma"),
    (re.compile(r"^(reg_token|storage_tokens)$"), "register_tokens"),
)


_GATES = (("fc1_g", "fc1_x"), ("gate_proj", "up_proj"), ("w1", "w2"))
"""Names of a gated MLP's two first layers where a file keeps them apart, the gate first."""


@dataclass
class NamedWeights:
    """A state dict under this package's names.

    Attributes:
        tensors: by our name; ``pos_embed`` is not yet divided into prefix and patches.
        origin: by our name, the name in the file.
        beside: entries of the file beside the encoder.
        changed: what was changed on the way.
    """

    tensors: dict[str, Tensor]
    origin: dict[str, str]
    beside: list[str]
    changed: list[str] = field(default_factory=list)


def rename_weights(state: Mapping[str, Any]) -> NamedWeights:
    """Find the encoder in a checkpoint and give its entries the names of `SRTransformer`.

    Args:
        state: a state dict with the names of timm, DINO, DINOv2, MAE, MONAI or this package, or a checkpoint with one.
    """
    tensors, origin, beside = _unwrap(state)
    named = NamedWeights({}, {}, beside)
    for name, value in tensors.items():
        new = name
        for pattern, replacement in _RENAME:
            new = pattern.sub(replacement, new)
        named.tensors[new] = value
        named.origin[new] = origin[name]
    _join_gates(named)
    return named


def _join_gates(named: NamedWeights) -> None:
    """Two first layers of a gated MLP as one, the gate's half first."""
    for gate, value in _GATES:
        for name in [name for name in named.tensors if f".mlp.{gate}." in name]:
            other, joined = (name.replace(f".mlp.{gate}.", f".mlp.{part}.") for part in (value, "linear1"))
            if other in named.tensors:
                named.tensors[joined] = torch.cat([named.tensors.pop(name), named.tensors.pop(other)])
                named.origin[joined] = f"{named.origin.pop(name)} and {named.origin.pop(other)}"
                named.changed = ["gate and value of the MLPs joined"]


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


def grid_of(count: int, grid: tuple[int, int] | None, name: str) -> tuple[int, int]:
    """Rows and columns of ``count`` positions: ``grid`` where it is given and fits, else a square.

    Raises:
        CheckpointError: where neither is so.
    """
    if grid is not None:
        if grid[0] * grid[1] != count:
            raise CheckpointError(f"{name} has {count} positions, which is not the grid {grid[0]} x {grid[1]}.")
        return grid
    side = math.isqrt(count)
    if side * side != count:
        raise CheckpointError(f"{name} has {count} positions, no square: give the grid it was trained on as 'grid'.")
    return side, side


def convert_state_dict(
    state: Mapping[str, Any],
    network: SRTransformer,
    grid: tuple[int, int] | None = None,
    resize: Mapping[str, Any] | None = None,
    registers_first: bool = False,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Rename a ViT's state dict (timm, DINO, DINOv2, MAE, MONAI or this package's) to `SRTransformer`'s names.

    Position embeddings of another grid are resized (bicubic). timm's and DINO's position of the class token is added to
    the class token, which is the same sum; positions of prefix tokens that timm adds to registers likewise.

    Args:
        state: state dict, or a checkpoint that holds one under ``teacher``, ``model``, ``state_dict`` or ``student``.
        network: the network that will take it.
        grid: rows and columns of the grid of the file's position embeddings; None: square.
        resize: how the file's authors resize position embeddings, see `resize_position_embeddings`.
        registers_first: the file's positions begin with those of the registers, not with the class token's.

    Returns:
        renamed state dict with those entries only that the network has a place for, and a report in which ``missing``
        and ``loaded`` are not filled in.

    Raises:
        CheckpointError: where position embeddings fit no grid, or the depth or the parts of the blocks differ.
    """
    named = rename_weights(state)
    report = LoadReport(unused=named.beside, changed=named.changed)
    out, file_name = named.tensors, named.origin
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
        first = extra - 1 if registers_first else 0  # where the class token's position lies
        if extra and "cls_token" in out:
            out["cls_token"] = out["cls_token"] + position[:, first : first + 1]
            report.changed.append("position of the class token added to cls_token")
        if extra > 1 and "register_tokens" in out:
            others = torch.cat([position[:, :first], position[:, first + 1 : extra]], dim=1)
            out["register_tokens"] = out["register_tokens"] + others
            report.changed.append("positions of registers added to register_tokens")
        out[table] = position[:, extra:]
        file_name[table] = file_name["pos_embed"]
    if table in out and out[table].shape[1] != target.shape[1]:
        old, new_grid = grid_of(out[table].shape[1], grid, "pos_embed"), network.patch_embedding.grid
        out[table] = resize_position_embeddings(out[table], old, new_grid, **(resize or {}))
        report.changed.append(f"position embeddings resized from {old[0]} x {old[1]} to {new_grid[0]} x {new_grid[1]}")
    own = network.state_dict()
    _check_stem(out, own, isinstance(network.patch_embedding, ConvolutionalStem))
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
                    f"the network has no place for {file_name[name]} (a gated MLP, layer scale, normed "
                    "queries, a bias?). Build it alike."
                )
            del out[name]
    return out, report


def _check_stem(state: Mapping[str, Tensor], own: Mapping[str, Tensor], wants_stem: bool) -> None:
    """Refuse weights whose patch tokens are made in another way than the network's; a part of them would stay random.

    Raises:
        CheckpointError: says what the file has and what the network has.
    """
    has_stem = PROJECTION + ".0.weight" in state
    if not has_stem and PROJECTION + ".weight" not in state:
        return
    if has_stem != wants_stem:
        kinds = {True: "a convolutional stem", False: "a patch projection"}
        raise CheckpointError(
            f"has {kinds[has_stem]}, the network {kinds[wants_stem]}. Build it with patch_embedding="
            f"{'stem' if has_stem else 'patch'!r}."
        )
    parts = [{name for name in names if name.startswith(PROJECTION + ".")} for names in (state, own)]
    if has_stem and parts[0] != parts[1]:
        raise CheckpointError(
            f"has another stem than the network: they differ in {sorted(parts[0] ^ parts[1])[:3]}. Build the network "
            "with the file's patch_size and stem_norm."
        )


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
    resize: Mapping[str, Any] | None = None,
    registers_first: bool = False,
) -> LoadReport:
    """Fill an `SRTransformer` with a ViT's published weights; nothing is downloaded.

    Args:
        network: takes the weights in place. Tables of iRPE stay as they are (zero at the start).
        weights: a state dict or checkpoint, or a local file or folder with one (see `read_weights`); names of timm,
            DINO, DINOv2, MAE, MONAI's ViT or this package.
        grid: rows and columns that the file's position embeddings are for; None: square.
        resize: how the file's authors resize position embeddings, see `resize_position_embeddings`.
        registers_first: the file's positions begin with those of the registers, not with the class token's.

    Returns:
        exactly what was loaded, not used, missing and changed.

    Raises:
        CheckpointError: where the file is unreadable, of another width, patch or depth, or holds no ViT.
    """
    where, state = read_weights(weights)
    try:
        fitting, report = convert_state_dict(state, network, grid, resize, registers_first)
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
