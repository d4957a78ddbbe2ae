"""State dicts as UNI2-h, Virchow2, GigaPath, H-optimus, DINOv2-g, CROWN and UniCAS are published, with small numbers.

Each is computed once more from the papers' equations, head by head and without this package's modules: attention
(Vaswani et al.), the transformer of Dosovitskiy et al., SwiGLU (Shazeer, 2020), LayerScale (Touvron et al., 2021),
registers (Darcet et al., 2024), normed queries and keys (Dehghani et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cytossl_monai.networks.convert import to_sr_transformer
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.networks.weights import load_vit_weights
from cytossl_monai.utils.errors import CheckpointError

WIDTH, HEADS, HIDDEN, PATCH, SIDE, DEPTH = 24, 3, 10, 8, 4, 4
State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How a model's authors name and arrange its weights.

    Args:
        first: the MLP's first layer, or two where gate and value are apart.
        last: its last layer.
        registers: how many, and under which name.
        prefix_positions: tokens before the patches that have a position: 0, 1 or 1 + registers.
        chunks: DINOv2's nesting of blocks.
        qk_norm: whether queries and keys are normed.
        registers_first: registers come before the class token.
        gate: what the MLP computes.
    """

    first: tuple[str, ...] = ("fc1",)
    last: str = "fc2"
    registers: int = 0
    register_name: str = "reg_token"
    prefix_positions: int = 1
    chunks: int = 0
    qk_norm: bool = False
    registers_first: bool = False
    gate: str = "swiglu"
    mask_token: bool = False

    def block(self, i: int) -> str:
        """Name of a block."""
        return f"blocks.{i // (DEPTH // self.chunks)}.{i}" if self.chunks else f"blocks.{i}"


LAYOUTS = {
    "uni2-h": Layout(registers=8, prefix_positions=0),
    "virchow2": Layout(registers=4, prefix_positions=5),
    "prov-gigapath": Layout(),
    "h-optimus": Layout(registers=4, prefix_positions=0),
    "dinov2-g": Layout(("w12",), "w3", mask_token=True),
    "dinov2-g-reg": Layout(("w12",), "w3", registers=4, register_name="register_tokens", mask_token=True),
    "crown": Layout(("w12",), "w3", chunks=2, mask_token=True),
    "unicas": Layout(),
    "gate and value apart": Layout(("w1", "w2"), "w3", registers=2, register_name="storage_tokens"),
    "registers first, queries normed": Layout(registers=2, prefix_positions=3, registers_first=True, qk_norm=True),
    "gate last": Layout(gate="glu"),
}


def random_state(layout: Layout, seed: int = 0) -> State:
    """Random weights in a layout."""
    make = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make) * 0.2

    state: State = {
        "cls_token": random(1, 1, WIDTH),
        "pos_embed": random(1, SIDE * SIDE + layout.prefix_positions, WIDTH),
        "patch_embed.proj.weight": random(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": random(WIDTH),
        "norm.weight": random(WIDTH),
        "norm.bias": random(WIDTH),
    }
    if layout.registers:
        state[layout.register_name] = random(1, layout.registers, WIDTH)
    if layout.mask_token:
        state["mask_token"] = random(1, WIDTH)

    def linear(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = random(outputs, inputs), random(outputs)

    for i in range(DEPTH):
        name = layout.block(i)
        for norm, width in [("norm1", WIDTH), ("norm2", WIDTH)]:
            state[f"{name}.{norm}.weight"], state[f"{name}.{norm}.bias"] = random(width), random(width)
        for norm in ("q_norm", "k_norm") if layout.qk_norm else ():
            state[f"{name}.attn.{norm}.weight"] = random(WIDTH // HEADS)
            state[f"{name}.attn.{norm}.bias"] = random(WIDTH // HEADS)
        linear(f"{name}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{name}.attn.proj", WIDTH, WIDTH)
        for part in layout.first:
            linear(f"{name}.mlp.{part}", WIDTH, 2 * HIDDEN // len(layout.first))
        linear(f"{name}.mlp.{layout.last}", HIDDEN, WIDTH)
        state[f"{name}.ls1.gamma"], state[f"{name}.ls2.gamma"] = random(WIDTH), random(WIDTH)
    return state


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm with an epsilon of 1e-6."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def plain_vit(state: State, layout: Layout, images: Tensor) -> Tensor:
    """Class token, registers and patches of the last layer, from the equations."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    batch = len(images)
    cut = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).reshape(batch, -1, 3 * 64)
    patches = cut @ state["patch_embed.proj.weight"].reshape(WIDTH, -1).T + state["patch_embed.proj.bias"]
    prefix = [state["cls_token"].expand(batch, -1, -1)]
    if layout.registers:
        registers = state[layout.register_name].expand(batch, -1, -1)
        prefix = [registers, *prefix] if layout.registers_first else [*prefix, registers]
    position, extra = state["pos_embed"], layout.prefix_positions
    patches = patches + position[:, extra:]
    tokens = torch.cat(prefix, dim=1)
    if extra:
        tokens = torch.cat([tokens[:, :extra] + position[:, :extra], tokens[:, extra:]], dim=1)
    x = torch.cat([tokens, patches], dim=1)
    size = WIDTH // HEADS
    for i in range(DEPTH):
        name = layout.block(i)
        y = norm(x, state[f"{name}.norm1.weight"], state[f"{name}.norm1.bias"])
        query, key, value = linear(f"{name}.attn.qkv", y).chunk(3, dim=-1)
        heads = []
        for h in range(HEADS):
            q, k, v = (part[..., h * size : (h + 1) * size] for part in (query, key, value))
            if layout.qk_norm:
                q = norm(q, state[f"{name}.attn.q_norm.weight"], state[f"{name}.attn.q_norm.bias"])
                k = norm(k, state[f"{name}.attn.k_norm.weight"], state[f"{name}.attn.k_norm.bias"])
            scores = q @ k.transpose(1, 2) / size**0.5
            heads.append(scores.softmax(-1) @ v)
        x = x + state[f"{name}.ls1.gamma"] * linear(f"{name}.attn.proj", torch.cat(heads, dim=-1))
        y = norm(x, state[f"{name}.norm2.weight"], state[f"{name}.norm2.bias"])
        halves = torch.cat([linear(f"{name}.mlp.{part}", y) for part in layout.first], dim=-1).chunk(2, dim=-1)
        if layout.gate == "swiglu":
            gated = halves[0] * torch.sigmoid(halves[0]) * halves[1]
        else:
            gated = halves[0] * torch.sigmoid(halves[1])
        x = x + state[f"{name}.ls2.gamma"] * linear(f"{name}.mlp.{layout.last}", gated)
    x = norm(x, state["norm.weight"], state["norm.bias"])
    if layout.registers_first:  # ours always begins with the class token
        x = torch.cat(
            [x[:, layout.registers : layout.registers + 1], x[:, : layout.registers], x[:, -SIDE * SIDE :]], 1
        )
    return x


def network_of(layout: Layout, **changes: Any) -> SRTransformer:
    """The network that the layout is for."""
    arguments: dict[str, Any] = {
        "in_channels": 3,
        "img_size": SIDE * PATCH,
        "patch_size": PATCH,
        "hidden_size": WIDTH,
        "mlp_dim": HIDDEN,
        "mlp_type": layout.gate,
        "num_layers": DEPTH,
        "num_heads": HEADS,
        "qkv_bias": True,
        "qk_norm": layout.qk_norm,
        "class_token": True,
        "layer_scale": 1e-5,
        "num_register_tokens": layout.registers,
        "norm_eps": 1e-6,
    }
    return SRTransformer(**{**arguments, **changes}).eval()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_key_is_loaded_and_the_outputs_are_the_equations(name: str) -> None:
    layout = LAYOUTS[name]
    state, images = random_state(layout), torch.rand(2, 3, SIDE * PATCH, SIDE * PATCH)
    network = network_of(layout)
    report = load_vit_weights(network, state, registers_first=layout.registers_first)
    assert report.unused == (["mask_token"] if layout.mask_token else [])
    assert report.missing == []
    with torch.no_grad():
        torch.testing.assert_close(network(images)[0], plain_vit(state, layout, images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if not layout.registers_first])
def test_a_state_dict_alone_becomes_a_sparse_relative_network(name: str) -> None:
    """With all keys kept and tables of iRPE at zero it computes what it did; sparse, it runs and can be trained."""
    layout = LAYOUTS[name]
    state, images = random_state(layout), torch.rand(2, 3, SIDE * PATCH, SIDE * PATCH)
    kind = {} if layout.gate == "swiglu" else {"mlp_type": layout.gate}
    with torch.no_grad():
        network = to_sr_transformer(state, rpe="product", sparsity="topk", keep_ratio=1.0, num_heads=HEADS, **kind)
        torch.testing.assert_close(network.eval()(images)[0], plain_vit(state, layout, images), atol=1e-5, rtol=1e-5)
    sparse = to_sr_transformer(state, sparsity="routed", num_salient=4, window=1, num_heads=HEADS, **kind)
    sparse(images)[0].square().sum().backward()
    assert sparse.blocks[0].mlp.linear1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("sparsity", ["topk", "routed"])
@pytest.mark.parametrize("packed", [False, True])
def test_normed_queries_and_keys_are_what_every_kernel_sees(sparsity: str, packed: bool) -> None:
    """Projections of queries and keys that are 50 times as large change nothing, as the norms take that back."""
    layout = LAYOUTS["registers first, queries normed"]
    network = network_of(layout, sparsity=sparsity, keep_ratio=0.5, num_salient=3, window=1)
    load_vit_weights(network, random_state(layout), registers_first=True)
    images = torch.rand(2, 3, SIDE * PATCH, SIDE * PATCH)
    foreground = None
    if packed:
        foreground = torch.zeros(2, SIDE * SIDE, dtype=torch.bool)
        foreground[0, :9] = foreground[1, 4:] = True
    with torch.no_grad():
        before = network(images, foreground=foreground)[0]
        for block in network.blocks:  # the same network with its projections scaled, which the norm takes back
            block.attn.qkv.weight[: 2 * WIDTH] *= 50.0
            block.attn.qkv.bias[: 2 * WIDTH] *= 50.0
            block.attn.q_norm.eps *= 2500.0
            block.attn.k_norm.eps *= 2500.0
        torch.testing.assert_close(network(images, foreground=foreground)[0], before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("antialias", "offset"), [(False, 0.0), (True, 0.0), (False, 0.1)])
def test_positions_are_resized_as_their_authors_do(antialias: bool, offset: float) -> None:
    layout = LAYOUTS["dinov2-g"]
    state = random_state(layout)
    network = network_of(layout, img_size=3 * PATCH)
    report = load_vit_weights(network, state, resize={"antialias": antialias, "offset": offset})
    table = state["pos_embed"][:, 1:].reshape(1, SIDE, SIDE, WIDTH).permute(0, 3, 1, 2)
    sizes: dict[str, Any] = {"size": (3, 3)} if not offset else {"scale_factor": ((3 + offset) / SIDE,) * 2}
    wanted = F.interpolate(table, mode="bicubic", antialias=antialias, **sizes).flatten(2).transpose(1, 2)
    torch.testing.assert_close(network.patch_embedding.position_embeddings, wanted)
    assert "position embeddings resized from 4 x 4 to 3 x 3" in report.changed


def test_what_does_not_fit_is_named() -> None:
    state = random_state(LAYOUTS["unicas"])
    with pytest.raises(CheckpointError, match=r"mlp\.linear1\.weight is \(20, 24\), the network has \(22, 24\)"):
        load_vit_weights(network_of(LAYOUTS["unicas"], mlp_dim=11), state)
    with pytest.raises(CheckpointError, match=r"no place for blocks\.0\.ls1\.gamma"):
        load_vit_weights(network_of(LAYOUTS["unicas"], layer_scale=None), state)
    with pytest.raises(CheckpointError, match=r"no place for blocks\.0\.attn\.q_norm"):
        load_vit_weights(network_of(LAYOUTS["gate last"]), random_state(LAYOUTS["registers first, queries normed"]))
    missing = load_vit_weights(network_of(LAYOUTS["unicas"]), {k: v for k, v in state.items() if k != "norm.bias"})
    assert missing.missing == ["norm.bias"]
    assert "missing: norm.bias" in str(missing)


@pytest.mark.parametrize("width", [1280, 1408, 1536])
def test_heads_of_large_models_are_never_guessed(width: int) -> None:
    state = {
        "patch_embed.proj.weight": torch.zeros(width, 3, 1, 1),
        "blocks.0.mlp.fc1.weight": torch.zeros(4, width),
        "blocks.0.mlp.fc2.weight": torch.zeros(width, 4),
    }
    with pytest.raises(ValueError, match=f"at width {width} it cannot be known .* give num_heads"):
        to_sr_transformer(state)
