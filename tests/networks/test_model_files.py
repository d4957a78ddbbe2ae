"""Model files: nothing in them is executed, what they name is listed, and the hash knows the architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import small_vit
from torch import nn

import cytossl_monai.networks as networks
from cytossl_monai.networks.build import NETWORKS, build_network, network_config, own_arguments
from cytossl_monai.networks.files import load_classifier, load_encoder, save_classifier, save_encoder
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash, encoder_hash_0_1
from cytossl_monai.networks.nets.resnet import ResNetFeatures
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.utils.errors import CheckpointError


def small(**options: Any) -> SRTransformer:
    """Few weights, the same ones whatever the options."""
    torch.manual_seed(0)
    return small_vit(num_layers=1, **options)


def test_the_hash_knows_the_architecture() -> None:
    """Equal weights, other attention: other features, so another hash."""
    plain = Encoder(small()).eval()
    others = [
        Encoder(small(sparsity="topk", keep_ratio=0.2)).eval(),
        Encoder(small(sparsity="routed", window=3, num_salient=2)).eval(),
        Encoder(small(sparsity="routed", window=1, num_salient=2)).eval(),
        Encoder(small(drop_background=True)).eval(),
        Encoder(small(num_heads=4)).eval(),
    ]
    for other in others:
        other.load_state_dict(plain.state_dict())
    assert len({encoder_hash_0_1(encoder) for encoder in [plain, *others]}) == 1
    assert len({encoder_hash(encoder) for encoder in [plain, *others]}) == len(others) + 1


def test_the_hash_is_that_of_the_file_and_of_the_arguments_that_matter(tmp_path: Path) -> None:
    encoder = Encoder(small(rpe={"method": "cross", "on": "qk"})).eval()
    save_encoder(tmp_path / "model.pt", encoder)
    assert encoder_hash(load_encoder(tmp_path / "model.pt")[0]) == encoder_hash(encoder)
    config = network_config(encoder.network)
    spelled_out = own_arguments(json.loads(json.dumps(config)))
    assert spelled_out == json.loads(json.dumps(own_arguments(config)))
    assert "sparsity" not in spelled_out, "a default counts as much as an argument that is not there"


def test_every_listed_network_is_one() -> None:
    for name in NETWORKS:
        with pytest.raises(ValueError, match=r"cannot be built|at least one member"):
            build_network({"_target_": f"cytossl_monai.networks.{name}", "members": [], "no_such_argument": 1})
    assert {"SRTransformer", "ABMIL", "MILEnsemble"} <= NETWORKS.keys()
    public = {
        n for n in networks.__all__ if isinstance(cls := getattr(networks, n), type) and issubclass(cls, nn.Module)
    }
    others = {"Encoder", "MILClassifier", "MILLoss"} | {
        "CallableNetwork",
        "ProgramNetwork",
    }  # which run code: a door of their own
    assert public - others <= NETWORKS.keys()


def classifier() -> MILClassifier:
    return MILClassifier(ABMIL(6, 2, embed_dim=8, attention_dim=4), ["negative", "positive"])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    save_encoder(tmp_path / "encoder.pt", Encoder(small()))
    save_classifier(tmp_path / "classifier.pt", classifier())
    return {"encoder": tmp_path / "encoder.pt", "classifier": tmp_path / "classifier.pt"}


DEEP = {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": 1}}}}}}}}
LOAD = {"encoder": load_encoder, "classifier": load_classifier}


@pytest.mark.parametrize("kind", LOAD)
@pytest.mark.parametrize(
    "target",
    [
        "monai.networks.nets.hovernet.download_url",
        "monai.networks.nets.resnet.resnet18",
        "cytossl_monai.networks.files.save_encoder",
        "cytossl_monai.networks.weights.read_state",
        "cytossl_monai.networks.nets.encoder.torch.save",
        "os.system",
        "",
        3,
        ["cytossl_monai.networks.SRTransformer"],
    ],
)
def test_what_a_file_names_is_listed_or_refused(kind: str, target: Any, files: dict[str, Path], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = torch.load(files[kind], weights_only=True)
    content["network"] = {
        "_target_": target,
        "url": "file:///etc/hostname",
        "filepath": str(marker),
        "path": str(marker),
    }
    torch.save(content, files[kind])
    with pytest.raises(CheckpointError, match=rf"{kind}\.pt"):
        LOAD[kind](files[kind])
    assert not marker.exists()


@pytest.mark.parametrize("kind", LOAD)
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**12, "embed_dim": 10**12},
        {"num_layers": 10**9, "attention_dim": 10**9},
        {"mlp_dim": -5, "embed_dim": -5},
        {"dropout_rate": "half", "dropout": "half"},
        {"img_size": None, "in_features": None},
        {"no_such_argument": 1},
        {
            "rpe": {"method": {"a": {"b": {"c": {"d": {"e": {"f": {}}}}}}}},
            "gated": {"a": {"b": {"c": {"d": {"e": {"f": {"g": 1}}}}}}},
        },
    ],
)
def test_arguments_that_do_not_fit_are_a_sentence(kind: str, change: Any, files: dict[str, Path]) -> None:
    content = torch.load(files[kind], weights_only=True)
    known = content["network"].keys() | {"no_such_argument"}
    content["network"] |= {name: value for name, value in change.items() if name in known or len(change) == 1}
    torch.save(content, files[kind])
    with pytest.raises(CheckpointError, match=rf"{kind}\.pt") as caught:
        LOAD[kind](files[kind])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", LOAD)
def test_weights_that_are_not_finite_are_refused(kind: str, files: dict[str, Path]) -> None:
    content = torch.load(files[kind], weights_only=True)
    name = next(n for n, v in content["state_dict"].items() if v.is_floating_point())
    content["state_dict"][name].view(-1)[0] = float("nan")
    torch.save(content, files[kind])
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        LOAD[kind](files[kind])


@pytest.mark.parametrize("kind", LOAD)
@pytest.mark.parametrize("field", ["network", "state_dict", "format", "version"])
def test_a_field_that_is_missing_is_a_sentence(kind: str, field: str, files: dict[str, Path]) -> None:
    content = torch.load(files[kind], weights_only=True)
    del content[field]
    torch.save(content, files[kind])
    with pytest.raises(CheckpointError, match=rf"{kind}\.pt"):
        LOAD[kind](files[kind])


def test_names_of_version_0_1_are_read(tmp_path: Path) -> None:
    """Classes have moved since; the last part of the name is what counts."""
    save_encoder(tmp_path / "model.pt", Encoder(ResNetFeatures()))
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["network"]["_target_"] = "cytossl_monai.networks.nets.encoders.ResNetFeatures"
    torch.save(content, tmp_path / "model.pt")
    assert load_encoder(tmp_path / "model.pt")[0].embed_dim == 2048
