"""The overlays in configs/backbone resolve over the pretraining bundle and build their encoder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ConfigParser

from cytossl_monai.networks import continued_encoder, efficientnet_lite0, load_encoder
from cytossl_monai.networks.blocks.stem import ConvolutionalStem
from cytossl_monai.networks.nets.efficientnet_lite import EfficientNetLite
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.networks.nets.resnet import ResNetFeatures, SmallResNet
from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.utils.errors import CheckpointError

TRANSFORMER_WIDTHS = {
    "sr_vit_tiny": 192,
    "sr_vit_tiny_stem": 192,
    "sr_vit_small": 384,
    "sr_vit_small_stem": 384,
    "sr_vit_base": 768,
    "vit_small": 384,
}
WIDTHS = {**TRANSFORMER_WIDTHS, "resnet10": 256, "resnet18": 512, "resnet50": 2048, "efficientnet_lite0": 304}
TRANSFORMERS = list(TRANSFORMER_WIDTHS)


def laid_over(repo_root: Path, name: str, **changes: object) -> ConfigParser:
    train = repo_root / "bundles" / "cytossl_pretrain" / "configs" / "train.json"
    parser = ConfigParser()
    parser.read_config([str(train), str(repo_root / "configs" / "backbone" / f"{name}.yaml")])
    for key, value in changes.items():
        parser[key] = value
    return parser


def test_every_overlay_is_tested(repo_root: Path) -> None:
    assert {path.stem for path in (repo_root / "configs" / "backbone").glob("*.yaml")} == {
        *WIDTHS,
        "published_vit",
        "encoder_card",
        "encoder_file",
        "lora",
    }


def test_lora_trains_low_ranks_norms_and_tables_alone(repo_root: Path) -> None:
    parser = laid_over(repo_root, "lora", backbone=sr_vit_tiny(num_layers=1))
    encoder = parser.get_parsed_content("encoder")
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    still = [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    assert trained
    assert still
    low_rank = [name for name in trained if name.endswith((".down", ".up"))]
    assert low_rank
    assert all(name in low_rank or "norm" in name or "table" in name for name in trained), trained
    assert any("qkv" in name for name in still)


@pytest.mark.parametrize("name", WIDTHS)
def test_builds_the_encoder_that_is_trained(name: str, repo_root: Path) -> None:
    parser = laid_over(repo_root, name)
    with torch.device("meta"):  # shapes only: the large ones are slow to draw
        encoder = parser.get_parsed_content("encoder")
        assert parser.get_parsed_content("network_def") is encoder
    assert isinstance(encoder, Encoder)
    assert encoder.embed_dim == WIDTHS[name]
    if name not in TRANSFORMERS:
        assert isinstance(encoder.network, ResNetFeatures | SmallResNet | EfficientNetLite)
        return
    assert isinstance(encoder.network, SRTransformer)
    assert isinstance(encoder.network.patch_embedding, ConvolutionalStem) == name.endswith("_stem")
    sparse = {block.attn.sparsity for block in encoder.network.blocks}
    kind = "routed" if name.endswith("_stem") else "topk" if name.startswith("sr_") else "none"
    assert sparse == {kind}
    if kind == "topk":  # as published
        attention = encoder.network.blocks[-1].attn
        assert (attention.num_keys, attention.sparse_prefix, attention.irpe.config.on) == (16, True, "qkv")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_other_patches_and_sizes(name: str, repo_root: Path) -> None:
    """Patch 8 by the named key; position embeddings are made for the size of the views."""
    parser = laid_over(repo_root, name, patch_size=8)
    parser["views"]["global_size"] = 96
    with torch.device("meta"):
        network = parser.get_parsed_content("backbone")
    assert network.patch_embedding.grid == (12, 12)


def test_the_keys_reach_the_network(repo_root: Path) -> None:
    changes = {
        "sparsity": "topk",
        "keep_ratio": 0.25,
        "rpe": {"method": "cross", "mode": "bias", "on": "qk"},
        "drop_background": {"threshold": 0.1, "on_blank": "darkest"},
        "drop_path_rate": 0.1,
        "num_register_tokens": 4,
        "attention_window": 1,
        "num_salient": 7,
    }
    network = laid_over(repo_root, "sr_vit_tiny", **changes).get_parsed_content("backbone")
    last = network.blocks[-1]
    assert (last.attn.sparsity, last.attn.keep_ratio, last.attn.window, last.attn.num_salient) == ("topk", 0.25, 1, 7)
    assert (last.attn.irpe.config.method, last.attn.irpe.config.on) == ("cross", "qk")
    assert last.drop_path.rate == pytest.approx(0.1)
    assert network.num_prefix == 5
    assert network.drop_background == changes["drop_background"]


def test_a_published_vit_is_taken_from_a_file(repo_root: Path, tmp_path: Path) -> None:
    settings = {"img_size": 64, "patch_size": 8, "hidden_size": 64, "mlp_dim": 64, "num_layers": 2, "num_heads": 1}
    vit = SRTransformer(3, **settings, class_token=True, norm_eps=1e-6).eval()
    torch.save({"teacher": vit.state_dict()}, tmp_path / "vit.pth")
    weights = str(tmp_path / "vit.pth")
    network = laid_over(repo_root, "published_vit", vit_weights=weights).get_parsed_content("backbone")
    assert {block.attn.sparsity for block in network.blocks} == {"routed"}
    dense = laid_over(repo_root, "published_vit", vit_weights=weights, sparsity="none").get_parsed_content("backbone")
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(dense.eval()(images)[0], vit(images)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*WIDTHS, "published_vit"])
def test_every_key_is_used_and_alternatives_are_keys(name: str, repo_root: Path) -> None:
    text = (repo_root / "configs" / "backbone" / f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    used = {value[1:] for value in content["backbone"].values() if isinstance(value, str) and value.startswith("@")}
    # freeze_patches is MoCo v3's own key, which a ResNet must switch off; the others are the bundle's.
    bundle_keys = {
        "backbone",
        "freeze_patches",
        "layer_decay",
        "base_lr",
        "warmup_epochs",
        "channels_last",
        "encoder#pool",
        "encoder#mean",
        "encoder#std",
    }
    assert set(content) - bundle_keys <= used
    for line in re.findall(r"^# (?:patch8|glass): (.+)$", text, re.MULTILINE):
        assert set(yaml.safe_load(line)) <= set(content)


def test_the_encoder_that_ships_is_trained_on(repo_root: Path) -> None:
    shipped = repo_root / "bundles" / "cytossl_pretrain" / "models" / "lite0_cells.pt"
    encoder = laid_over(repo_root, "encoder_file", start_from=str(shipped)).get_parsed_content("encoder")
    same, meta = load_encoder(shipped)
    assert encoder.hash == same.hash
    assert encoder.meta["license"] == meta["license"]
    fresh = efficientnet_lite0(frozen=3)
    assert {name for name, p in encoder.network.named_parameters() if p.requires_grad} == {
        name for name, p in fresh.named_parameters() if p.requires_grad
    }


def test_what_cannot_be_trained_on_is_named(repo_root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="start_from is not set: give the encoder"):
        continued_encoder(None)
    with pytest.raises(CheckpointError, match=r"crown.yaml is a card: lay configs/backbone/encoder_card.yaml"):
        continued_encoder(repo_root / "configs" / "encoders" / "crown.yaml")
    with pytest.raises(CheckpointError, match=r"gone.pt"):
        continued_encoder(tmp_path / "gone.pt")
    program = torch.jit.trace(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)), torch.rand(1, 3, 4, 4))
    torch.jit.save(program, tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match=r"program.pt can be applied but not trained on"):
        continued_encoder(tmp_path / "program.pt")


def test_moco_v3_takes_the_resnet(repo_root: Path) -> None:
    parser = ConfigParser()
    configs = repo_root / "configs"
    parser.read_config(
        [
            str(repo_root / "bundles" / "cytossl_pretrain" / "configs" / "train.json"),
            str(configs / "ssl" / "moco_v3.yaml"),
            str(configs / "backbone" / "resnet50.yaml"),
        ]
    )
    parser["head_hidden_dim"] = 16
    assert parser.get_parsed_content("method").student.embed_dim == 2048


def test_a_card_is_trained_on_with_its_normalisation(repo_root: Path, tmp_path: Path) -> None:
    card = {
        "name": "small",
        "network": {"patch_size": 8, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 10},
        "tile_size": 32,
        "mean": [0.7, 0.6, 0.7],
        "license": "CC-BY-NC-4.0",
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(card))
    torch.manual_seed(0)
    made = SRTransformer(
        3, 32, qkv_bias=True, class_token=True, norm_eps=1e-6, **card["network"], rpe=None, sparsity="none"
    )
    torch.save(made.state_dict(), tmp_path / "small.pth")
    parser = laid_over(
        repo_root,
        "encoder_card",
        card=str(tmp_path / "small.yaml"),
        weights=str(tmp_path / "small.pth"),
        num_salient=4,
        attention_window=1,
    )
    encoder = parser.get_parsed_content("encoder")
    assert parser.get_parsed_content("backbone") is encoder.network
    assert encoder.network.blocks[0].attn.sparsity == "routed"
    assert encoder.network.blocks[0].attn.irpe is not None
    torch.testing.assert_close(encoder.network.blocks[1].mlp.linear1.weight, made.blocks[1].mlp.linear1.weight)
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor([0.7, 0.6, 0.7]))
    assert encoder.meta["license"] == "CC-BY-NC-4.0"


def test_a_card_is_trained_on_by_lora(repo_root: Path, tmp_path: Path) -> None:
    """An overlay that changes the network of the encoder, as LoRA's does, goes over the card's."""
    from cytossl_monai.networks.lora import has_lora

    shape = {"patch_size": 8, "hidden_size": 24, "num_layers": 1, "num_heads": 3, "mlp_dim": 10}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"name": "small", "network": shape, "tile_size": 32}))
    made = SRTransformer(3, 32, qkv_bias=True, class_token=True, norm_eps=1e-6, **shape)
    torch.save(made.state_dict(), tmp_path / "small.pth")
    changes = {"sparsity": "none", "card": str(tmp_path / "small.yaml"), "weights": str(tmp_path / "small.pth")}
    parser = laid_over(repo_root, "encoder_card", **changes)
    parser["encoder"]["network"] = {"_target_": "cytossl_monai.networks.add_lora", "network": "@backbone", "rank": 2}
    encoder = parser.get_parsed_content("encoder")
    assert has_lora(encoder)
    assert not encoder.network.blocks[0].mlp.linear1.weight.requires_grad
