"""EfficientNet-Lite0: equal to the published package where that is installed, and to its formula where not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cytossl_monai.networks import Encoder, build_encoder, efficientnet_lite0, load_encoder, save_encoder
from cytossl_monai.networks.nets.efficientnet_lite import EfficientNetLite, load_efficientnet_lite_weights
from cytossl_monai.utils.errors import CheckpointError

PUBLISHED = {
    "stem.conv": "_conv_stem",
    "stem.bn": "_bn0",
    "expand.conv": "_expand_conv",
    "expand.bn": "_bn0",
    "depthwise.conv": "_depthwise_conv",
    "depthwise.bn": "_bn1",
    "project.conv": "_project_conv",
    "project.bn": "_bn2",
}


def published_name(name: str) -> str:
    layer, leaf = name.rsplit(".", 1)
    if layer in PUBLISHED:
        return f"{PUBLISHED[layer]}.{leaf}"
    blocks, number, layer = layer.split(".", 2)
    return f"_{blocks}.{number}.{PUBLISHED[layer]}.{leaf}"


def randomised(**arguments: object) -> EfficientNetLite:
    """Norms and statistics away from 1 and 0, so that a mistake in them shows."""
    torch.manual_seed(0)
    network = efficientnet_lite0(**arguments)  # type: ignore[arg-type]
    for name, value in network.state_dict().items():
        if name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("bn.bias", "running_mean")):
            value.uniform_(-0.2, 0.2)
    return network.eval()


def tensorflow_same(x: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
    """TensorFlow's rule: out = ceil(in / stride), what is missing split, the odd pixel on the right and below."""
    kernel = weight.shape[-1]
    pads = []
    for side in (x.shape[-1], x.shape[-2]):
        missing = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)


def by_formula(network: EfficientNetLite, x: Tensor) -> list[Tensor]:
    state = network.state_dict()

    def layer(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        x = tensorflow_same(x, weight, stride, groups=x.shape[1] // weight.shape[1])
        mean, var, scale, shift = (
            state[f"{name}.bn.{leaf}"].view(1, -1, 1, 1) for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    x = layer(x, "stem", 2).clamp(0, 6)
    outputs = []
    for number in range(len(network.blocks)):
        name = f"blocks.{number}"
        out = layer(x, f"{name}.expand").clamp(0, 6) if f"{name}.expand.conv.weight" in state else x
        out = layer(out, f"{name}.depthwise", 2 if number in (1, 3, 5, 11) else 1).clamp(0, 6)
        out = layer(out, f"{name}.project")
        x = x + out if out.shape == x.shape and number not in (0,) else out
        outputs.append(x)
    return outputs


def test_equals_its_formula() -> None:
    network = randomised(taps=[2, 10, 15])
    images = torch.randn(2, 3, 64, 96)
    outputs = by_formula(network, images)
    wanted = torch.cat([outputs[tap].mean((2, 3)) for tap in (2, 10, 15)], 1)
    assert network.embed_dim == 24 + 112 + 320 == wanted.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(network(images), wanted, atol=1e-4, rtol=1e-4)


def test_equals_the_published_package() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")
    torch.manual_seed(0)
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    ours = efficientnet_lite0(taps=[15])
    unused = load_efficientnet_lite_weights(ours, theirs.state_dict())
    assert all(name.startswith(("_conv_head", "_bn1", "_fc")) for name in unused)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        x = theirs._swish(theirs._bn0(theirs._conv_stem(images)))
        for block in theirs._blocks:
            x = block(x)
        torch.testing.assert_close(ours.eval()(images), x.mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_takes_published_names_and_leaves_what_is_behind(tmp_path: Path) -> None:
    whole = randomised(taps=[15])
    state = {published_name(name): value for name, value in whole.state_dict().items()}
    state |= {"_conv_head.weight": torch.zeros(1280, 320, 1, 1), "_fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "lite0.pth")
    cut = efficientnet_lite0(taps=[10], weights=tmp_path / "lite0.pth").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(cut(images), by_formula(whole, images)[10].mean((2, 3)), atol=1e-4, rtol=1e-4)
    del state["_blocks.3._bn1.weight"]
    with pytest.raises(
        CheckpointError, match=r"not an EfficientNet-Lite0; differs in blocks\.3\.depthwise\.bn\.weight"
    ):
        load_efficientnet_lite_weights(efficientnet_lite0(), state)
    with pytest.raises(CheckpointError, match="not an EfficientNet-Lite0"):
        load_efficientnet_lite_weights(efficientnet_lite0(), {"conv1.weight": torch.zeros(64, 3, 7, 7)})


def test_frozen_blocks_stay_to_the_bit() -> None:
    network = efficientnet_lite0(taps=[4], frozen=2).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    still = ("stem.", "blocks.0.", "blocks.1.")
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith(still))
    for number in (2, 3, 4):
        for leaf in ("project.conv.weight", "project.bn.running_mean"):
            assert not torch.equal(after[f"blocks.{number}.{leaf}"], before[f"blocks.{number}.{leaf}"])


def test_file_brings_it_back(tmp_path: Path) -> None:
    encoder = Encoder(randomised(taps=[4], frozen=1)).eval()
    save_encoder(tmp_path / "model.pt", encoder)
    loaded, _ = load_encoder(tmp_path / "model.pt")
    assert loaded.hash == encoder.hash
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), encoder(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"taps": []}, "rising order"),
        ({"taps": [4, 4]}, "rising order"),
        ({"taps": [16]}, "0 to 15"),
        ({"taps": [3], "frozen": 5}, "frozen must be 0 to 4"),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        efficientnet_lite0(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        build_encoder({"network": {"_target_": "cytossl_monai.networks.EfficientNetLite", **arguments}})
