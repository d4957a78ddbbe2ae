"""Encoders: pooling, normalisation, ResNet-50 with torchvision's names, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import ViT
from tiny_encoders import small_vit
from torch import nn

from cytossl_monai.networks.build import build_network, network_config
from cytossl_monai.networks.files import build_encoder, load_encoder, save_encoder
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
from cytossl_monai.networks.nets.resnet import resnet50
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.utils.errors import CheckpointError


def small(**changes: Any) -> SRTransformer:
    return small_vit(**{"rpe": "product", "sparsity": "topk", **changes})


@pytest.mark.parametrize("registers", [0, 2])
def test_pools(registers: int) -> None:
    network = small(num_register_tokens=registers).eval()
    images = torch.rand(2, 3, 32, 32)
    plain = Encoder(network, "cls", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    tokens, _ = network(images)
    cls, mean = tokens[:, 0], tokens[:, 1 + registers :].mean(dim=1)
    for pool, wanted in (("cls", cls), ("mean", mean), ("cls+mean", torch.cat([cls, mean], dim=1))):
        plain.pool = pool
        torch.testing.assert_close(plain(images), wanted)
        assert plain.embed_dim == wanted.shape[1]


def test_mean_is_over_the_patches_that_were_encoded() -> None:
    encoder = Encoder(small(), "mean").eval()
    images = torch.rand(2, 3, 32, 32)
    foreground = torch.zeros(2, 16, dtype=torch.bool)
    foreground[0, :3] = foreground[1, 7] = True
    got = encoder(images, foreground=foreground)
    for i, keep in enumerate(([[0, 1, 2]], [[7]])):
        _, patches = encoder.forward_tokens(images[i : i + 1], keep=torch.tensor(keep))
        torch.testing.assert_close(got[i], patches[0].mean(dim=0), atol=1e-5, rtol=1e-5)


def test_glass_is_found_before_normalisation() -> None:
    encoder = Encoder(small(drop_background=True)).eval()
    image = torch.full((1, 3, 32, 32), 240, dtype=torch.uint8)
    image[:, :, 8:16, 8:24] = 90
    wanted = torch.zeros(1, 16, dtype=torch.bool)
    wanted[:, 5:7] = True
    assert torch.equal(encoder(image), encoder(image, foreground=wanted))


def test_bytes_and_floats_are_the_same_tile_normalised() -> None:
    encoder = Encoder(small(), mean=(0.5, 0.6, 0.7), std=(0.1, 0.2, 0.3)).eval()
    tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(encoder(tiles), encoder(tiles.float() / 255))
    by_hand = torch.stack(
        [(tiles[:, c] / 255 - m) / s for c, (m, s) in enumerate([(0.5, 0.1), (0.6, 0.2), (0.7, 0.3)])]
    )
    torch.testing.assert_close(encoder(tiles), encoder.network(by_hand.transpose(0, 1))[0][:, 0])


def test_takes_any_network() -> None:
    """MONAI's ViT gives a tuple of tokens, a ResNet vectors."""
    images = torch.rand(2, 3, 32, 32)
    vit = ViT(3, 32, 8, hidden_size=24, mlp_dim=32, num_layers=1, num_heads=3, spatial_dims=2)
    assert Encoder(vit, "mean")(images).shape == (2, 24)
    encoder = Encoder(nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1)))
    assert encoder(images).shape == (2, 5)
    assert encoder.embed_dim == 5


def monai_vit(**changes: Any) -> ViT:
    """A small 2D ViT of MONAI's."""
    settings = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 1, "num_heads": 3, "spatial_dims": 2, **changes}
    return ViT(3, (32, 48), 8, **settings)


class TokensOfOthers(nn.Module):
    """A class token (minus one), two registers (100) and the pixels as patches."""

    has_class_token, num_prefix = True, 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, 3 + H W, C)."""
        prefix = torch.tensor([-1.0, 100.0, 100.0]).view(1, 3, 1).expand(len(x), -1, x.shape[1])
        return torch.cat([prefix, x.flatten(2).transpose(1, 2)], dim=1)


@pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
def test_monais_vit_has_a_width(proj_type: str) -> None:
    """Its images are of one size; the mode of every part is what it was before."""
    encoder = Encoder(monai_vit(proj_type=proj_type), "mean").train()
    encoder.network.norm.eval()
    assert encoder.embed_dim == 24
    assert encoder.training
    assert encoder.network.blocks.training
    assert not encoder.network.norm.training
    assert Encoder(monai_vit(classification=True, num_classes=5)).embed_dim == 5


def test_pool_is_heeded_whatever_the_network() -> None:
    images, options = torch.rand(2, 3, 4, 4), {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    mean = images.mean(dim=(2, 3))
    assert (Encoder(TokensOfOthers(), "cls", **options)(images) == -1).all()
    torch.testing.assert_close(Encoder(TokensOfOthers(), "mean", **options)(images), mean)
    both = Encoder(TokensOfOthers(), "cls+mean", **options)
    torch.testing.assert_close(both(images), torch.cat([-torch.ones(2, 3), mean], dim=1))
    assert both.embed_dim == 6


def test_a_mode_is_given_back_after_a_failure() -> None:
    encoder = Encoder(nn.Conv2d(4, 2, 1)).train()
    with pytest.raises(RuntimeError):
        _ = encoder.embed_dim
    assert encoder.training
    assert encoder.network.training


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Encoder(small(), "max"), "cls, mean, cls\\+mean; got 'max'"),
        (lambda: Encoder(small(class_token=False)), "needs a class token"),
        (lambda: Encoder(small(), std=(1.0, 0.0, 1.0)), "std above 0"),
        (lambda: Encoder(small())(torch.rand(1, 4, 32, 32)), r"\(B, 3, H, W\).*\(1, 4, 32, 32\)"),
        (lambda: Encoder(small())(torch.zeros(1, 3, 32, 32, dtype=torch.int64)), "uint8.*int64"),
        (lambda: Encoder(nn.Conv2d(3, 4, 1)).forward_tokens(torch.rand(1, 3, 8, 8)), "no patch tokens"),
        (lambda: Encoder(monai_vit()), "MONAI's ViT has not"),
        (lambda: Encoder(resnet50(), "cls+mean"), "ResNetFeatures gives one vector a tile: leave pool out"),
        (lambda: Encoder(nn.Conv2d(3, 4, 1), "mean")(torch.rand(1, 3, 8, 8)), "no tokens: leave pool out"),
        (lambda: Encoder(nn.Flatten(2))(torch.rand(1, 3, 8, 8)), "says of no class token"),
        (lambda: build_encoder({"pool": "cls"}), "needs 'network'"),
        (lambda: build_network({"_target_": "os.system", "command": "true"}), "must name a network"),
        (lambda: build_network({"_target_": "cytossl_monai.networks.nets.encoder.nothing"}), "does not exist"),
        (lambda: network_config(nn.Linear(1, 1)), "does not keep its constructor arguments"),
    ],
)
def test_bad_input_is_named(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def torchvision_resnet50() -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's ResNet-50, written down from its structure."""
    entries: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            entries[f"{name}.{part}"] = (width,)
        entries[f"{name}.num_batches_tracked"] = ()

    entries["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    inputs = 64
    for layer, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            for conv, shape in enumerate([(width, inputs, 1), (width, width, 3), (4 * width, width, 1)], start=1):
                entries[f"{name}.conv{conv}.weight"] = (shape[0], shape[1], shape[2], shape[2])
                norm(f"{name}.bn{conv}", shape[0])
            if block == 0:
                entries[f"{name}.downsample.0.weight"] = (4 * width, inputs, 1, 1)
                norm(f"{name}.downsample.1", 4 * width)
            inputs = 4 * width
    entries["fc.weight"], entries["fc.bias"] = (1000, 2048), (1000,)
    return entries


def test_resnet50_is_torchvisions_key_for_key(tmp_path: Path) -> None:
    wanted = torchvision_resnet50()
    assert sum(torch.Size(shape).numel() for name, shape in wanted.items() if not name.endswith(("mean", "var"))) == (
        25_557_032 + 53  # torchvision's number of parameters, and one counter a normalisation
    )
    network = resnet50(num_classes=1000)
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == wanted

    state = network.state_dict()
    torch.save(state, tmp_path / "resnet50.pth")
    features = resnet50(weights=tmp_path / "resnet50.pth")  # the classifier of the file is left out
    images = torch.rand(1, 3, 64, 64)
    network.eval()
    features.eval()
    torch.testing.assert_close(network.fc(features(images)), network(images))
    # Stride 2 in the 3 x 3 convolution: torchvision's ("v1.5"), and bottlenecks without bias.
    assert features.layer2[0].conv2.stride == (2, 2)
    assert features.layer2[0].conv1.stride == (1, 1)
    assert features(images).shape == (1, 2048)

    del state["layer3.5.conv2.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"layer3\.5\.conv2\.weight"):
        resnet50(weights=tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        resnet50(weights=tmp_path / "none.pth")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Encoder]:
    encoder = Encoder(small(rpe={"method": "cross", "on": "qk"}), "cls+mean", std=(0.2, 0.3, 0.4)).eval()
    path = tmp_path_factory.mktemp("encoder") / "model.pt"
    save_encoder(path, encoder, {"name": "try", "mpp": 0.5})
    return path, encoder


def test_file_holds_all_that_is_needed(saved: tuple[Path, Encoder]) -> None:
    path, encoder = saved
    again, meta = load_encoder(path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images), encoder(images))
    assert not again.training
    assert meta == {"name": "try", "mpp": 0.5}
    assert encoder_hash(again) == encoder_hash(encoder)
    with torch.no_grad():
        again.network.norm.bias[0] += 1e-3
    assert encoder_hash(again) != encoder_hash(encoder)


def test_file_is_plain_data(saved: tuple[Path, Encoder]) -> None:
    content = torch.load(saved[0], weights_only=True)
    assert content["network"]["_target_"].endswith("SRTransformer")
    parser = ConfigParser({"net": content["network"]})
    assert isinstance(parser.get_parsed_content("net"), SRTransformer)


def damaged(path: Path, folder: Path, how: str) -> Path:
    target = folder / "model.pt"
    if how == "cut":
        target.write_bytes(path.read_bytes()[:1000])
        return target
    content = torch.load(path, weights_only=True)
    if how == "other network":
        content["network"] = {**content["network"], "hidden_size": 48}
    elif how == "other code":
        content["network"] = {"_target_": "subprocess.run", "args": "true"}
    elif how == "newer":
        content["version"] = 99
    elif how == "plain weights":
        content = content["state_dict"]
    elif how == "pickle":
        content = {**content, "meta": {"path": Path("x")}}
    torch.save(content, target)
    return target


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "cannot be read"),
        ("other network", "do not fit.*24.*48|do not fit.*48.*24"),
        ("other code", "must name a network"),
        ("newer", "version 99"),
        ("plain weights", "not an encoder file"),
        ("pickle", "cannot be read"),
    ],
)
def test_bad_files_are_named(how: str, words: str, saved: tuple[Path, Encoder], tmp_path: Path) -> None:
    path = damaged(saved[0], tmp_path, how)
    with pytest.raises(CheckpointError, match=rf"(?s)model\.pt.*({words})"):
        load_encoder(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt: no such file"):
        load_encoder(tmp_path / "none.pt")


def test_larger_images_are_brought_down_to_the_input_size(tmp_path: Path) -> None:
    network = SRTransformer(3, 32, 8, 24, 48, 1, 3, class_token=True)
    plain, sized = Encoder(network).eval(), Encoder(network, input_size=32).eval()
    small, large = torch.rand(2, 3, 16, 16), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(sized(small), plain(small))  # a local view is encoded as it is
    shrunk = torch.nn.functional.interpolate(large / 255, size=(32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(sized(large), plain(shrunk))
    assert sized.hash != plain.hash
    save_encoder(tmp_path / "model.pt", sized)
    loaded, _ = load_encoder(tmp_path / "model.pt")
    assert loaded.input_size == 32
    torch.testing.assert_close(loaded(large), sized(large))
    with pytest.raises(ValueError, match="input_size"):
        Encoder(network, input_size=0)


def test_a_file_of_a_network_of_vectors_may_name_a_pool(tmp_path: Path) -> None:
    """Version 0.1 took any pool for a ResNet and heeded none: such files are read as before."""
    encoder = Encoder(resnet50()).eval()
    save_encoder(tmp_path / "model.pt", encoder)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save({**content, "pool": "mean"}, tmp_path / "old.pt")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(tmp_path / "old.pt")[0](images), encoder(images))


def test_two_scales_stand_side_by_side() -> None:
    encoder = Encoder(SRTransformer(3, 32, 8, 24, 48, 1, 3, class_token=True)).eval()
    tiles, before = torch.rand(2, 3, 32, 32), encoder.hash
    one = encoder(tiles)
    encoder.scales = 2
    both = encoder(tiles)
    assert both.shape == (2, encoder.embed_dim) == (2, 48)
    assert torch.equal(both[:, :24], one)
    centre = torch.nn.functional.interpolate(tiles[..., 8:24, 8:24], size=(32, 32), mode="bilinear")
    encoder.scales = 1
    torch.testing.assert_close(both[:, 24:], encoder(centre))
    encoder.scales = 2
    assert encoder.hash != before  # other features: a classifier on one scale refuses them
