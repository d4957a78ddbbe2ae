"""Cards of published encoders, and the one door: files, cards, programs, callables."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from cytossl_monai.networks import cards
from cytossl_monai.networks.cards import card_encoder, card_network, read_card
from cytossl_monai.networks.files import save_encoder
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.networks.open import open_encoder
from cytossl_monai.networks.weights import load_vit_weights
from cytossl_monai.utils.errors import CheckpointError

CARDS = Path(__file__).parents[2] / "configs" / "encoders"
SMALL = {"patch_size": 8, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_type": "swiglu", "mlp_dim": 10}


def published_shapes(
    width: int,
    depth: int,
    patch: int,
    positions: int,
    hidden: int | None = None,
    mlp: int | None = None,
    registers: int = 0,
    dinov2: bool = False,
    chunks: int = 0,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file, written down from its authors' code: timm's names or DINOv2's."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, positions, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers:
        shapes["register_tokens" if dinov2 else "reg_token"] = (1, registers, width)
    if dinov2:
        shapes["mask_token"] = (1, width)
    first, last = ("w12", "w3") if dinov2 and hidden else ("fc1", "fc2")
    inner, outer = (2 * hidden, hidden) if hidden else (mlp or 0, mlp or 0)
    for i in range(depth):
        name = f"blocks.{i // (depth // chunks)}.{i}" if chunks else f"blocks.{i}"
        for part, shape in {
            "norm1": (width,),
            "norm2": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            f"mlp.{first}": (inner, width),
            f"mlp.{last}": (width, outer),
        }.items():
            shapes[f"{name}.{part}.weight"], shapes[f"{name}.{part}.bias"] = shape, shape[:1]
        shapes[f"{name}.ls1.gamma"] = shapes[f"{name}.ls2.gamma"] = (width,)
    return shapes


PUBLISHED: dict[str, dict[str, Any]] = {
    "crown": {"width": 1024, "depth": 24, "patch": 16, "positions": 197, "hidden": 2736, "dinov2": True, "chunks": 4},
    "unicas": {"width": 1024, "depth": 24, "patch": 16, "positions": 197, "hidden": 2736},
    "uni": {"width": 1024, "depth": 24, "patch": 16, "positions": 197, "mlp": 4096},
    "uni2_h": {"width": 1536, "depth": 24, "patch": 14, "positions": 256, "hidden": 4096, "registers": 8},
    "virchow": {"width": 1280, "depth": 32, "patch": 14, "positions": 257, "hidden": 3416},
    "virchow2": {"width": 1280, "depth": 32, "patch": 14, "positions": 261, "hidden": 3416, "registers": 4},
    "prov_gigapath": {"width": 1536, "depth": 40, "patch": 16, "positions": 197, "hidden": 4096},
    "h_optimus_0": {"width": 1536, "depth": 40, "patch": 14, "positions": 256, "hidden": 4096, "registers": 4},
    "h_optimus_1": {"width": 1536, "depth": 40, "patch": 14, "positions": 256, "hidden": 4096, "registers": 4},
    "dinov2_g": {"width": 1536, "depth": 40, "patch": 14, "positions": 1370, "hidden": 4096, "dinov2": True},
    "dinov2_g_reg4": {
        "width": 1536, "depth": 40, "patch": 14, "positions": 1370, "hidden": 4096, "registers": 4, "dinov2": True,
    },
    "dinov2_l": {"width": 1024, "depth": 24, "patch": 14, "positions": 1370, "mlp": 4096, "dinov2": True},
}  # fmt: skip
# From the models' pages: millions of parameters, and the heads.
MILLIONS = {"uni2_h": 681, "virchow2": 631, "prov_gigapath": 1135, "h_optimus_0": 1135, "uni": 303}
HEADS = {"uni2_h": 24, "virchow": 16, "virchow2": 16, "prov_gigapath": 24, "dinov2_g": 24, "crown": 16, "unicas": 16}


def test_every_card_is_whole() -> None:
    vits = {path.stem for path in CARDS.glob("*.yaml") if read_card(path).architecture == "vit"}
    assert vits == set(PUBLISHED)
    for path in sorted(CARDS.glob("*.yaml")):
        card = read_card(path)
        assert card.license, path
        assert card.source, path
        assert card.citation, path
        assert card.embed_dim, path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_fills_the_network_of_its_card(name: str) -> None:
    """At full size, without memory: every entry of the file has its place, and every parameter is filled."""
    card = read_card(CARDS / f"{name}.yaml")
    with torch.device("meta"):
        network = card_network(card, None)
        state = {key: torch.empty(shape) for key, shape in published_shapes(**PUBLISHED[name]).items()}
        assert isinstance(network, SRTransformer)
        report = load_vit_weights(network, state, None, dict(card.positions))
    assert report.missing == []
    assert report.unused == (["mask_token"] if "mask_token" in state else [])
    assert network.blocks[0].attn.num_heads == HEADS.get(name, network.blocks[0].attn.num_heads)
    assert Encoder(network, card.pool).embed_dim == card.embed_dim
    if name in MILLIONS:
        assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == MILLIONS[name]


def small_state(seed: int = 0) -> dict[str, Tensor]:
    """A file for the card of `write_card`."""
    make = torch.Generator().manual_seed(seed)
    shapes = published_shapes(24, 2, 8, 17, hidden=10, registers=0)
    return {name: torch.randn(shape, generator=make) * 0.2 for name, shape in shapes.items()}


def write_card(folder: Path, **changes: Any) -> Path:
    """A card of a small model."""
    content = {
        "name": "small",
        "network": {**SMALL, "layer_scale": 1.0},
        "tile_size": 32,
        "mpp": 0.5,
        "embed_dim": 24,
        "license": "CC-BY-NC-4.0",
        "commercial": False,
        "source": "https://example.org/small",
        **changes,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not ...}))
    return path


@pytest.mark.parametrize("form", ["pth", "safetensors", "folder", "shards"])
def test_weights_in_every_form(form: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state, card = small_state(), write_card(tmp_path)
    weights = tmp_path / "weights"
    if form == "pth":
        weights = tmp_path / "weights.pth"
        torch.save({"model": state, "epoch": 3}, weights)
    elif form == "safetensors":
        weights = tmp_path / "weights.safetensors"
        save_file(state, weights)
    elif form == "folder":
        weights.mkdir()
        save_file(state, weights / "model.safetensors")
        torch.save(small_state(1), weights / "pytorch_model.bin")  # the safer form is taken
    else:
        weights.mkdir()
        names = sorted(state)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for part, entries in parts.items():
            save_file({name: state[name] for name in entries}, weights / part)
        index = {"weight_map": {name: part for part, entries in parts.items() for name in entries}}
        (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    encoder, meta = open_encoder(card, weights)
    wanted = card_encoder(card, state)
    assert encoder_hash(encoder) == encoder_hash(wanted)
    assert not encoder.training
    assert (meta["name"], meta["mpp"], meta["tile_size"], meta["license"]) == ("small", 0.5, 32, "CC-BY-NC-4.0")
    assert encoder_hash(card_encoder(card, small_state(1))) != encoder_hash(encoder)


def test_a_card_can_be_made_an_sr_transformer(tmp_path: Path) -> None:
    changes = {"rpe": "product", "sparsity": "routed", "num_salient": 4, "window": 1}
    network = card_network(write_card(tmp_path), small_state(), **changes)
    assert network.blocks[1].attn.sparsity == "routed"
    assert network.blocks[1].attn.irpe is not None
    torch.testing.assert_close(network.blocks[1].mlp.linear1.weight, small_state()["blocks.1.mlp.fc1.weight"])


def test_a_licence_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cards._said.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            card_encoder(write_card(tmp_path), small_state())
    said = [record.getMessage() for record in caplog.records if "CC-BY-NC" in record.getMessage()]
    assert len(said) == 1
    assert "not for commercial use" in said[0]


class _Runs:
    """Unpickling this would call a function."""

    def __reduce__(self) -> Any:
        return (print, ("was run",))


def test_bad_cards_and_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card, state = write_card(tmp_path), small_state()

    def refused(words: str, *arguments: Any) -> None:
        with pytest.raises(CheckpointError, match=words):
            open_encoder(*arguments)

    refused(r"needs the weights.*https://example\.org/small.*CC-BY-NC-4\.0.*Nothing is downloaded", card)
    refused("no such card", tmp_path / "absent.yaml")
    refused(r"absent\.pth: no such file", card, tmp_path / "absent.pth")
    other = {**state, "norm.weight": torch.zeros(30)}
    torch.save(other, tmp_path / "other.pth")
    refused(r"norm\.weight is \(30,\), the network has \(24,\)", card, tmp_path / "other.pth")
    torch.save({key: value for key, value in state.items() if key != "norm.bias"}, tmp_path / "lacks.pth")
    refused(r"lack norm\.bias", card, tmp_path / "lacks.pth")
    torch.save({"model": state, "code": _Runs()}, tmp_path / "code.pth")
    refused("objects whose code would run", card, tmp_path / "code.pth")
    assert "was run" not in capsys.readouterr().out
    torch.jit.script(nn.ReLU()).save(tmp_path / "program.pt")
    refused("is a TorchScript program, no weights", card, tmp_path / "program.pt")
    torch.save(state, tmp_path / "good.pth")
    refused("has the SHA-256 .* not 00", write_card(tmp_path, sha256="00"), tmp_path / "good.pth")
    refused("does not know wieghts", write_card(tmp_path, wieghts=1))
    refused("pool must be one of cls", write_card(tmp_path, pool="max"))
    refused("architecture must be one of vit", write_card(tmp_path, architecture="swin"))
    refused("needs num_heads", write_card(tmp_path, network={"patch_size": 8}))
    refused(
        "its network cannot be built.*depht", write_card(tmp_path, network={**SMALL, "depht": 3}), tmp_path / "good.pth"
    )
    refused("embed_dim is 48, but the network gives 24", write_card(tmp_path, embed_dim=48), tmp_path / "good.pth")
    (tmp_path / "text.yaml").write_text("- a\n- b\n")
    refused("is no encoder card", tmp_path / "text.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    refused("cannot be read as YAML", tmp_path / "broken.yaml")
    (tmp_path / "empty").mkdir()
    refused("holds no weights", write_card(tmp_path), tmp_path / "empty")
    for name in ("one.pth", "two.pth"):
        torch.save(state, tmp_path / "empty" / name)
    refused("several files of weights .one.pth, two.pth.", write_card(tmp_path), tmp_path / "empty")


class Mean(nn.Module):
    """An encoder of one line: the mean of each channel, twice."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 6)."""
        mean = x.mean(dim=(2, 3))
        return torch.cat([mean, self.factor * mean], dim=1)


def program(kind: str, folder: Path, factor: float = 2.0, batch: int | None = None) -> Path:
    """`Mean` as a file; ``batch`` fixes how many images it takes."""
    model, example = Mean(factor).eval(), torch.rand(batch or 2, 3, 32, 32)
    if kind == "torchscript":
        torch.jit.trace(model, example).save(folder / "mean.pt")
        return folder / "mean.pt"
    if kind == "exported":
        dynamic = None if batch else {"x": {0: torch.export.Dim("batch")}}
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=dynamic), folder / "mean.pt2")
        return folder / "mean.pt2"
    pytest.importorskip("onnxruntime")
    axes = None if batch else {"x": {0: "batch"}}
    torch.onnx.export(model, (example,), folder / "mean.onnx", input_names=["x"], dynamic_axes=axes, dynamo=False)
    return folder / "mean.onnx"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["torchscript", "exported", "onnx"])
@pytest.mark.parametrize("batch", [None, 2])
def test_programs_give_what_they_gave(kind: str, batch: int | None, tmp_path: Path) -> None:
    path = program(kind, tmp_path, batch=None if kind == "torchscript" else batch)
    tiles = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    encoder, meta = open_encoder(path)
    torch.testing.assert_close(encoder(tiles), Mean()(tiles / 255))
    assert encoder.embed_dim == 6
    assert meta["name"] == "mean"
    before = encoder_hash(encoder)
    assert encoder_hash(open_encoder(path)[0]) == before
    assert encoder_hash(open_encoder(program(kind, tmp_path, factor=3.0, batch=batch))[0]) != before


@pytest.mark.filterwarnings("ignore")
def test_a_card_normalises_for_a_program(tmp_path: Path) -> None:
    path = program("torchscript", tmp_path)
    card = write_card(
        tmp_path, architecture="program", network=..., embed_dim=6, mean=[0.5, 0.5, 0.5], std=[0.1, 0.2, 0.3]
    )
    encoder, meta = open_encoder(card, path)
    tiles = torch.rand(2, 3, 32, 32)
    std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(encoder(tiles), Mean()((tiles - 0.5) / std))
    assert meta["tile_size"] == 32
    with pytest.raises(ValueError, match="gives 6 values a tile, but is declared with embed_dim 7"):
        open_encoder(write_card(tmp_path, architecture="program", network=..., embed_dim=7), path)[0](tiles)
    torch.save(small_state(), tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match="is neither TorchScript"):
        open_encoder(card, tmp_path / "state.pth")


def test_a_function_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lab_encoders.py").write_text(
        "import torch\n"
        "def build(factor=2.0):\n"
        "    return lambda images: factor * images.mean(dim=(2, 3))\n"
        "def tokens():\n"
        "    return lambda images: images.flatten(2).transpose(1, 2)\n"
        "def broken():\n"
        "    raise RuntimeError('no weights')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = {"architecture": "callable", "callable": "my_lab_encoders:build", "embed_dim": 3, "mean": [0, 0, 0]}
    card = write_card(tmp_path, **changes, std=[1, 1, 1], network={"factor": 4.0})
    encoder, _ = open_encoder(card)
    tiles = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(encoder(tiles), 4 * tiles.mean(dim=(2, 3)))
    before = encoder_hash(encoder)
    (tmp_path / "my_lab_encoders.py").write_text((tmp_path / "my_lab_encoders.py").read_text() + "# changed\n")
    assert encoder_hash(open_encoder(card)[0]) != before
    with pytest.raises(CheckpointError, match="declare its width"):
        open_encoder("my_lab_encoders:build")
    with pytest.raises(CheckpointError, match="raises RuntimeError: no weights"):
        open_encoder("my_lab_encoders:broken")
    with pytest.raises(CheckpointError, match="cannot be imported"):
        open_encoder("my_lab_encoders:absent")
    pooled = write_card(
        tmp_path, **{**changes, "callable": "my_lab_encoders:tokens"}, pool="mean", std=[1, 1, 1], network=...
    )
    torch.testing.assert_close(open_encoder(pooled)[0](tiles), tiles.mean(dim=(2, 3)))


def test_the_network_of_a_method_is_evaluated_moved_and_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As packages have it that give features by a method of theirs (EfficientNet-Lite's ``extract_features``)."""
    (tmp_path / "my_lab_method.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, bias):\n"
        "        super().__init__()\n"
        "        self.conv, self.drop = torch.nn.Conv2d(3, 4, 3), torch.nn.Dropout(0.5)\n"
        "        torch.nn.init.ones_(self.conv.weight)\n"
        "        torch.nn.init.constant_(self.conv.bias, bias)\n"
        "    def features(self, x):\n"
        "        return self.drop(self.conv(x))\n"
        "def build(bias=0.0):\n"
        "    return Net(bias).features\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = {"architecture": "callable", "callable": "my_lab_method:build", "embed_dim": 4}
    encoder, _ = open_encoder(write_card(tmp_path, **changes, network={}))
    assert not encoder.network.owner.training
    tiles = torch.rand(2, 3, 8, 8)
    wanted = encoder.network.owner.conv(encoder.normalise(tiles)[1]).mean(dim=(2, 3))
    torch.testing.assert_close(encoder(tiles), wanted)
    assert encoder.double().network.owner.conv.weight.dtype == torch.float64
    other, _ = open_encoder(write_card(tmp_path, **changes, network={"bias": 1.0}))
    assert encoder_hash(other) != encoder_hash(encoder.float())


def test_an_encoder_file_of_ours(tmp_path: Path) -> None:
    encoder = card_encoder(write_card(tmp_path), small_state())
    save_encoder(tmp_path / "model.pt", encoder, {"mpp": 0.5})
    again, meta = open_encoder(tmp_path / "model.pt")
    assert encoder_hash(again) == encoder_hash(encoder)
    assert meta == {"name": "model", "mpp": 0.5}
    with pytest.raises(CheckpointError, match=r"weights .x\.pth. are for a card"):
        open_encoder(tmp_path / "model.pt", "x.pth")
    with pytest.raises(CheckpointError, match=r"these are weights alone\. Give the model's card"):
        open_encoder(tmp_path)


def test_a_hub_is_asked_only_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="huggingface_hub is not installed"):
        open_encoder(write_card(tmp_path, hub="owner/name"), "hf-hub:")
    with pytest.raises(CheckpointError, match="names no model on a hub"):
        open_encoder(write_card(tmp_path), "hf-hub:")
    asked: list[tuple[str, str]] = []

    class Hub:
        """Stands in for the library."""

        @staticmethod
        def hf_hub_download(name: str, file: str) -> str:
            """Remember what was asked for."""
            asked.append((name, file))
            torch.save(small_state(), tmp_path / file)
            return str(tmp_path / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    open_encoder(write_card(tmp_path, hub="owner/name", file="small.pth"), "hf-hub:")
    assert asked == [("owner/name", "small.pth")]


def test_resnet_cut_as_clam_does(tmp_path: Path) -> None:
    from cytossl_monai.networks.nets.resnet import ResNetFeatures

    whole = ResNetFeatures(num_classes=1000).eval()
    torch.save(whole.state_dict(), tmp_path / "resnet50.pth")
    encoder, _ = open_encoder(CARDS / "resnet50_clam.yaml", tmp_path / "resnet50.pth")
    tiles, kept = torch.rand(2, 3, 64, 64), {}
    whole.layer3.register_forward_hook(lambda _, __, out: kept.update(out=out))
    with torch.no_grad():
        whole(encoder.normalise(tiles)[1])
        torch.testing.assert_close(encoder(tiles), kept["out"].mean(dim=(2, 3)))
    assert encoder.embed_dim == 1024


def test_resnet_v2_against_its_equations() -> None:
    """One block and the stem, computed by hand from the state dict."""
    import torch.nn.functional as F

    from cytossl_monai.networks.nets.resnet import ResNetV2Features

    network = ResNetV2Features().eval()
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif value.is_floating_point():
            value.normal_(0.0, 0.3)
    state, x = network.state_dict(), torch.rand(1, 3, 33, 33)

    def norm(name: str, value: Tensor) -> Tensor:
        parts = (
            state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        mean, variance, weight, bias = parts
        return (value - mean) / (variance + 1e-5).sqrt() * weight + bias

    stem = F.conv2d(norm("bn0", x), state["conv0.weight"], stride=2, padding=3)
    stem = F.max_pool2d(norm("bn1", stem).clamp_min(0), 3, 2, 1)
    torch.testing.assert_close(network.pool(network.bn1(network.conv0(network.bn0(x))).relu()), stem)
    stem = torch.rand(1, 256, 9, 9)  # the second stage begins with a stride
    active = norm("stage2.0.bn1", stem).clamp_min(0)
    y = norm("stage2.0.bn2", F.conv2d(active, state["stage2.0.conv1.weight"])).clamp_min(0)
    y = F.conv2d(y, state["stage2.0.conv2.weight"], stride=2, padding=1)
    y = F.conv2d(norm("stage2.0.bn3", y).clamp_min(0), state["stage2.0.conv3.weight"])
    wanted = y + F.conv2d(active, state["stage2.0.down.weight"], stride=2)
    torch.testing.assert_close(network.stage2[0](stem), wanted, atol=1e-3, rtol=1e-4)
    assert math.prod(network(x).shape) == 1024
