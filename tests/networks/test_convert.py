"""Plain ViTs as SR-Transformers: MONAI's, and others' written once more from the published mathematics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import ViT
from torch import Tensor, nn

from cytossl_monai.networks.convert import to_sr_transformer
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.networks.weights import load_vit_weights
from cytossl_monai.utils.errors import CheckpointError

WIDTH, HEADS, HIDDEN, PATCH = 24, 3, 40, 8
EXACT = [{"sparsity": "none"}, {"sparsity": "topk", "keep_ratio": 1.0}]
RPES = [None, "product", {"method": "cross", "mode": "bias", "on": "qkv"}]


class _Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        heads = []
        for h in range(HEADS):
            part = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / (WIDTH // HEADS) ** 0.5
            heads.append(scores.softmax(-1) @ v[..., part])
        return self.proj(torch.cat(heads, dim=-1))


class _Part(nn.Module):
    """A module that holds what its names say."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class PublishedViT(nn.Module):
    """A ViT with the parameter names of timm, DINO, DINOv2 and MAE: class token, then registers, then patches."""

    def __init__(
        self, grid: tuple[int, int] = (4, 4), registers: int = 0, scale: bool = False, bias: bool = True, depth: int = 2
    ) -> None:
        super().__init__()
        projection = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.patch_embed = _Part(proj=projection, grid_size=grid, patch_size=(PATCH, PATCH))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], WIDTH))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, WIDTH))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            mlp = _Part(fc1=nn.Linear(WIDTH, HIDDEN), act=nn.GELU(), fc2=nn.Linear(HIDDEN, WIDTH))
            norms = {"norm1": nn.LayerNorm(WIDTH, eps=1e-6), "norm2": nn.LayerNorm(WIDTH, eps=1e-6)}
            scales = {f"ls{i}": _Part(gamma=nn.Parameter(torch.ones(WIDTH))) for i in (1, 2)} if scale else {}
            self.blocks.append(_Part(attn=_Attention(bias), mlp=mlp, **norms, **scales))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        if hasattr(self, "register_tokens"):
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            scales = [getattr(block, name).gamma if hasattr(block, name) else 1.0 for name in ("ls1", "ls2")]
            x = x + scales[0] * block.attn(block.norm1(x))
            x = x + scales[1] * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        return self.norm(x)


@pytest.mark.parametrize("rpe", RPES)
@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("classification", [False, True])
def test_monais_vit_computes_what_it_did(rpe: Any, exact: dict[str, Any], classification: bool) -> None:
    vit = ViT(
        3, 32, PATCH, WIDTH, HIDDEN, 2, HEADS, classification=classification, num_classes=4, spatial_dims=2
    ).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    network = to_sr_transformer(vit, rpe=rpe, **exact)
    assert not network.training
    images = torch.rand(2, 3, 32, 32)
    (got, hidden), (wanted, wanted_hidden) = network(images), vit(images)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden[-1], wanted_hidden[-1], atol=1e-5, rtol=1e-5)


PUBLISHED = [
    {},
    {"registers": 4, "scale": True},  # DINOv2 with registers
    {"grid": (4, 6), "bias": False},
]


@pytest.mark.parametrize("arguments", PUBLISHED)
@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("as_state", [False, True])
def test_published_vits_compute_what_they_did(arguments: dict[str, Any], exact: dict[str, Any], as_state: bool) -> None:
    vit = PublishedViT(**arguments).eval()
    size = [PATCH * side for side in arguments.get("grid", (4, 4))]
    further = {"num_heads": HEADS, "img_size": size} if as_state else {}
    network = to_sr_transformer(vit.state_dict() if as_state else vit, rpe=RPES[2], **exact, **further).eval()
    images = torch.rand(2, 3, *size)
    torch.testing.assert_close(network(images)[0], vit(images), atol=1e-5, rtol=1e-5)


def test_what_is_kept_is_trained_on() -> None:
    vit = PublishedViT()
    network = to_sr_transformer(vit, rpe="product", sparsity="routed", window=1, num_salient=4)
    network(torch.rand(2, 3, 32, 32))[0].square().sum().backward()
    table = network.blocks[0].attn.irpe.key_table
    assert not table.any()  # the start is zero, its gradient is not
    assert table.grad.any()
    assert {block.attn.sparsity for block in network.blocks} == {"routed"}


def test_from_a_file_in_a_bundle_config(tmp_path: Path) -> None:
    from monai.bundle import ConfigParser

    vit = PublishedViT().eval()
    torch.save({"teacher": vit.state_dict()}, tmp_path / "dino.pth")
    settings = {"model": str(tmp_path / "dino.pth"), "num_heads": HEADS, "sparsity": "none"}
    target = "cytossl_monai.networks.convert.to_sr_transformer"
    network = ConfigParser({"backbone": {"_target_": target, **settings}}).get_parsed_content("backbone").eval()
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(network(images)[0], vit(images), atol=1e-5, rtol=1e-5)


def as_dino(state: dict[str, Tensor]) -> dict[str, Any]:
    """DINO's training checkpoint: student and teacher, each behind wrappers and with a head."""
    wrapped = {f"module.backbone.{name}": value for name, value in state.items()}
    teacher = {f"backbone.{name}": value for name, value in state.items()}
    head = torch.zeros(3)
    return {
        "student": {**{name: value + 1 for name, value in wrapped.items()}, "module.head.mlp.0.bias": head},
        "teacher": {**teacher, "head.mlp.0.bias": head},
        "epoch": 3,
    }


def as_dinov2(state: dict[str, Tensor]) -> dict[str, Any]:
    """DINOv2: plain names, a mask token, and blocks in chunks as its training code nests them."""
    chunked = {name.replace("blocks.", "blocks.0.", 1): value for name, value in state.items()}
    return {**chunked, "mask_token": torch.zeros(1, WIDTH)}


def as_mae(state: dict[str, Tensor]) -> dict[str, Any]:
    decoder = {"decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_pos_embed": torch.ones(1, 17, 8)}
    return {"model": {**state, **decoder, "mask_token": torch.zeros(1, 1, 8)}}


def as_timm(state: dict[str, Tensor]) -> dict[str, Any]:
    return {**state, "head.weight": torch.zeros(10, WIDTH), "head.bias": torch.zeros(10)}


@pytest.mark.parametrize(
    ("wrap", "unused"),
    [
        (as_timm, ["head.bias", "head.weight"]),
        (as_dino, ["epoch", "student", "teacher/head.mlp.0.bias"]),
        (as_dinov2, ["mask_token"]),
        (as_mae, ["model/decoder_blocks.0.norm1.weight", "model/decoder_pos_embed", "model/mask_token"]),
    ],
)
def test_names_of_others_are_read_and_the_rest_is_reported(wrap: Any, unused: list[str], tmp_path: Path) -> None:
    vit = PublishedViT().eval()
    torch.save(wrap(vit.state_dict()), tmp_path / "weights.pth")
    network = sr(rpe="product").eval()
    report = load_vit_weights(network, tmp_path / "weights.pth")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(network(images)[0], vit(images), atol=1e-5, rtol=1e-5)
    assert sorted(report.unused) == unused
    assert report.missing == [f"blocks.{i}.attn.irpe.key_table" for i in (0, 1)]
    assert sorted([*report.loaded, *report.missing]) == sorted(network.state_dict())
    assert all(name in str(report) for name in unused)


def sr(**changes: Any) -> SRTransformer:
    settings = {"in_channels": 3, "img_size": 32, "patch_size": PATCH, "hidden_size": WIDTH, "mlp_dim": HIDDEN}
    settings |= {"num_layers": 2, "num_heads": HEADS, "qkv_bias": True, "class_token": True, "norm_eps": 1e-6}
    return SRTransformer(**{**settings, **changes})


def test_position_embeddings_are_resized() -> None:
    """Positions that grow evenly over the old grid grow evenly over the new one; the class token's is kept."""
    state = PublishedViT().state_dict()
    rows = torch.arange(4.0).repeat_interleave(4)
    state["pos_embed"] = torch.cat([torch.tensor([9.0]), rows]).view(1, 17, 1).expand(1, 17, WIDTH).clone()
    network = sr(img_size=64)
    report = load_vit_weights(network, state)
    table = network.patch_embedding.position_embeddings[0, :, 0].view(8, 8)
    torch.testing.assert_close(table[:, 0], table[:, 7])
    torch.testing.assert_close(table[2:6, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]), atol=0.1, rtol=0)
    torch.testing.assert_close(network.cls_token, state["cls_token"] + 9.0)
    assert report.changed == [
        "position of the class token added to cls_token",
        "position embeddings resized from 4 x 4 to 8 x 8",
    ]


def test_monais_and_own_weights_are_read() -> None:
    vit = ViT(3, 32, PATCH, WIDTH, HIDDEN, 2, HEADS, classification=True, spatial_dims=2, qkv_bias=True)
    report = load_vit_weights(sr(), vit.state_dict())
    assert {name.split(".")[0] for name in report.unused} == {"classification_head", "blocks"}
    assert all("norm_cross_attn" in name or "head" in name for name in report.unused)
    own = sr(rpe="euclid")
    again = sr(rpe="euclid")
    assert load_vit_weights(again, own.state_dict()).missing == []
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), again.parameters()))


def changed(**entries: Any) -> dict[str, Any]:
    state = {**PublishedViT().state_dict(), **entries}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: load_vit_weights(sr(hidden_size=48), changed()), r"24\), the network has \(1, 1, 48\): another width"),
        (lambda: load_vit_weights(sr(patch_size=16), changed()), "patch size"),
        (lambda: load_vit_weights(sr(num_layers=3), changed()), "has 2 blocks, the network 3"),
        (lambda: load_vit_weights(sr(num_layers=1), changed()), "has 2 blocks, the network 1"),
        (lambda: load_vit_weights(sr(), PublishedViT(scale=True).state_dict()), r"no place for blocks\.0\.ls1\.gamma"),
        (lambda: load_vit_weights(sr(), {"conv1.weight": torch.ones(1)}), r"holds no ViT .*conv1\.weight"),
        (lambda: load_vit_weights(sr(), changed(pos_embed=torch.zeros(1, 24, WIDTH))), "23 positions.*as 'grid'"),
        (lambda: load_vit_weights(sr(), "none.pth"), r"none\.pth: no such file"),
        (lambda: to_sr_transformer(nn.Linear(2, 2)), "a MONAI ViT, a timm VisionTransformer .* not Linear"),
        (
            lambda: to_sr_transformer(changed(**{"norm.weight": None}), sparsity="none", num_heads=3),
            r"lack \['norm\.weight'\]",
        ),
        (lambda: to_sr_transformer(changed()), "number of heads"),
        (lambda: to_sr_transformer(changed(pos_embed=torch.zeros(1, 24, WIDTH)), num_heads=3), "give img_size"),
        (
            lambda: to_sr_transformer(changed(**{"blocks.0.mlp.fc2.weight": torch.ones(24, 13)}), num_heads=3),
            "neither two layers nor gated",
        ),
        (lambda: to_sr_transformer(ViT(1, (16, 16, 16), 8, 24, 40, 1, 3)), "spatial_dims=2"),
    ],
)
def test_bad_weights_are_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half a file")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match=r"half\.pth: cannot be read"):
        load_vit_weights(sr(), tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=r"tensor\.pth: holds Tensor"):
        load_vit_weights(sr(), tmp_path / "tensor.pth")


def test_what_computes_otherwise_is_refused() -> None:
    quick, normed = PublishedViT(), PublishedViT()
    quick.blocks[0].mlp.act = nn.SiLU()
    normed.blocks[0].attn.q_norm = nn.LayerNorm(8)
    for vit, word in ((quick, "SiLU"), (normed, "queries and keys")):
        with pytest.raises(ValueError, match=word):
            to_sr_transformer(vit)


def timm_variants(timm: Any) -> list[dict[str, Any]]:
    """Small ones of plain ViTs and of the families that pathology encoders belong to."""
    swiglu = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 0.1}
    return [
        {},
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1},
        {"img_size": (32, 48)},
        {**swiglu, "reg_tokens": 8, "no_embed_class": True, "mlp_ratio": 2.66667 * 2},  # UNI2-h, H-optimus
        {**swiglu, "reg_tokens": 4, "mlp_ratio": 5.3375},  # Virchow2
        {**swiglu, "mlp_ratio": 2.671875 * 2},  # UniCAS, GigaPath
        {"mlp_layer": timm.layers.GluMlp, "mlp_ratio": 4, "act_layer": nn.GELU},
        {"mlp_layer": timm.layers.SwiGLU, "mlp_ratio": 2, "act_layer": nn.SiLU},
        {"qk_norm": True},
    ]


@pytest.mark.parametrize("number", range(9))
def test_timm_itself(number: int) -> None:
    timm = pytest.importorskip("timm")
    variant = timm_variants(timm)[number]
    small = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 0}
    vit = timm.models.vision_transformer.VisionTransformer(**{**small, **variant}).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.rand(2, 3, *([32, 48] if "img_size" in variant else [32, 32]))
    with torch.no_grad():
        network = to_sr_transformer(vit, rpe="product", sparsity="none")
        torch.testing.assert_close(network(images)[0], vit.forward_features(images), atol=1e-5, rtol=1e-5)
