"""The convolutional stem and the small ResNets: tokens against a naive loop, what a token sees, weights both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cytossl_monai.networks.blocks.stem import ConvolutionalStem, stem_widths
from cytossl_monai.networks.convert import to_sr_transformer
from cytossl_monai.networks.files import load_encoder, save_encoder
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.networks.nets.resnet import SmallResNet, resnet10, resnet18
from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny_stem
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.networks.weights import load_vit_weights
from cytossl_monai.utils.errors import CheckpointError

SIDE, PATCH = 32, 8


def network(patch_embedding: str = "stem", **arguments: object) -> SRTransformer:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "mlp_dim": 64,
        "num_layers": 2,
        "num_heads": 1,
        "qkv_bias": True,
        "class_token": True,
        "norm_eps": 1e-6,
        "rpe": "product",
        "sparsity": "routed",
        "num_salient": 4,
        "window": 1,
        "patch_size": PATCH,
    }
    made = SRTransformer(3, SIDE, patch_embedding=patch_embedding, **{**settings, **arguments})  # type: ignore[arg-type]
    for name, parameter in made.named_parameters():
        if ".irpe." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def naive_stem(stem: ConvolutionalStem, image: Tensor) -> Tensor:
    """Tokens (N, C) of one image (3, H, W), output pixel by output pixel."""
    for layer in stem.patch_embeddings:  # type: ignore[union-attr]
        if not isinstance(layer, torch.nn.Conv2d):
            image = layer(image[None])[0]
            continue
        (side, _), (step, _), (pad, _) = layer.kernel_size, layer.stride, layer.padding
        padded = torch.zeros(image.shape[0], image.shape[1] + 2 * pad, image.shape[2] + 2 * pad, dtype=image.dtype)
        padded[:, pad : pad + image.shape[1], pad : pad + image.shape[2]] = image
        rows, cols = image.shape[1] // step, image.shape[2] // step
        out = torch.zeros(layer.out_channels, rows, cols, dtype=image.dtype)
        for i in range(rows):
            for j in range(cols):
                window = padded[:, i * step : i * step + side, j * step : j * step + side]
                out[:, i, j] = (layer.weight * window).sum((1, 2, 3))
                if layer.bias is not None:
                    out[:, i, j] += layer.bias
        image = out
    return image.flatten(1).T


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_tokens_are_those_of_a_naive_loop(norm: str) -> None:
    stem = network(stem_norm=norm).double().patch_embedding
    assert isinstance(stem, ConvolutionalStem)
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        for image, tokens in zip(images, stem.embed(images), strict=True):
            torch.testing.assert_close(tokens, naive_stem(stem, image))
    assert stem.grid_size(16, 24) == (2, 3)


def test_a_token_sees_its_patch_and_as_much_again_around_it() -> None:
    stem = network().patch_embedding
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    tokens = stem.embed(image)
    row, col = 3, 4
    tokens[0, row * 8 + col].sum().backward()
    assert image.grad is not None
    seen = image.grad.abs().sum((0, 1)).nonzero()
    (top, left), (bottom, right) = seen.amin(0).tolist(), seen.amax(0).tolist()
    assert bottom - top + 1 == right - left + 1 == 2 * PATCH - 1
    assert abs((top + bottom) / 2 - (row + 0.5) * PATCH) <= PATCH / 2
    assert top <= row * PATCH
    assert bottom >= row * PATCH


def test_only_the_patch_embedding_differs_from_a_plain_network() -> None:
    stem, plain = network("stem"), network("patch")
    names = {name for name in stem.state_dict() if not name.startswith("patch_embedding.patch_embeddings")}
    assert names == {n for n in plain.state_dict() if not n.startswith("patch_embedding.patch_embeddings")}
    plain.load_state_dict({n: v for n, v in stem.state_dict().items() if n in names}, strict=False)
    images = torch.randn(2, 3, SIDE, SIDE)
    plain.patch_embedding.embed = lambda x, hidden=None: stem.patch_embedding.embed(x, hidden)  # type: ignore[method-assign]
    with torch.no_grad():
        torch.testing.assert_close(plain(images)[0], stem(images)[0])


@pytest.mark.parametrize("training", [False, True])
def test_no_token_sees_a_pixel_that_is_hidden(training: bool) -> None:
    net = network().train(training)
    images = torch.randn(2, 3, SIDE, SIDE)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [5, 6]], mask[1, 9] = True, True
    keep = torch.tensor([[0, 3, 10], [1, 2, 15]])
    pixels = mask.view(2, 1, 4, 4).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).expand(-1, 3, -1, -1)
    for hidden, arguments in (
        (pixels, {"mask": mask, "mask_token": torch.randn(64)}),
        (
            torch.ones(2, 16, dtype=torch.bool)
            .scatter_(1, keep, False)
            .view(2, 1, 4, 4)
            .repeat_interleave(PATCH, 2)
            .repeat_interleave(PATCH, 3)
            .expand(-1, 3, -1, -1),
            {"keep": keep},
        ),
    ):
        given = images.clone().requires_grad_()
        out = net.forward_features(given, **arguments)
        (out.cls.square().sum() + (out.patches * torch.randn_like(out.patches)).sum()).backward()
        assert given.grad is not None
        assert (given.grad[hidden] == 0).all()
        assert (given.grad[~hidden] != 0).any()


def test_background_is_dropped_as_with_patches() -> None:
    net = network(drop_background={"threshold": 0.06})
    images = torch.full((2, 3, SIDE, SIDE), 0.95)
    images[0, :, :16, :20], images[1, :, 8:, 8:16] = 0.3, 0.4
    out = Encoder(net, "cls").eval()._features(images)
    assert out.foreground is not None
    assert 0 < out.foreground.sum() < out.foreground.numel()
    assert (out.patches[~out.foreground] == 0).all()
    for i in range(2):  # packed with others or alone
        alone = Encoder(net, "cls").eval()._features(images[i : i + 1])
        torch.testing.assert_close(out.cls[i], alone.cls[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_converted_from_its_own_weights_it_is_the_same_network(norm: str) -> None:
    net = network(stem_norm=norm)
    again = to_sr_transformer(net.state_dict(), num_salient=4, window=1)
    assert again.config["patch_embedding"] == "stem"
    load_vit_weights(again, net.state_dict())
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images)[0], net(images)[0])


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        ({}, {"patch_embedding": "patch"}, "has a patch projection, the network a convolutional stem"),
        ({"patch_embedding": "patch"}, {}, "has a convolutional stem, the network a patch projection"),
        ({}, {"patch_size": 16}, "another stem"),
        ({"stem_norm": "group"}, {"stem_norm": "batch"}, "another stem"),
    ],
)
def test_weights_of_another_stem_are_refused(
    target: dict[str, object], source: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_vit_weights(network(**target), network(**source).state_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 12}, "must be 2, 4, 8, 16, 32 or 64; got 12"),
        ({"patch_size": (8, 16)}, "square patches"),
        ({"proj_type": "perceptron"}, "leave proj_type at 'conv'"),
        ({"stem_norm": "layer"}, "norm must be one of batch, group"),
        ({"patch_embedding": "conv"}, "patch_embedding must be one of patch, stem"),
        ({"patch_size": 64}, "must divide img_size"),
    ],
)
def test_what_is_no_stem_gets_a_sentence(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not divide into patches of 8 x 8"):
        network()(torch.zeros(1, 3, 36, 32))


def test_widths_double_towards_the_token() -> None:
    assert stem_widths(16, 192) == [16, 24, 48, 96]
    assert stem_widths(8, 384) == [48, 96, 192]
    assert sr_vit_tiny_stem(num_layers=1).patch_embedding.grid == (14, 14)


@pytest.mark.filterwarnings("ignore")
def test_files_and_torchscript_give_the_same(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8)
    for encoder in (Encoder(sr_vit_tiny_stem(num_layers=1)), Encoder(resnet10(8)), Encoder(resnet18(8, "group"))):
        encoder.eval()
        save_encoder(tmp_path / "e.pt", encoder, {"mpp": 0.25})
        again, _ = load_encoder(tmp_path / "e.pt")
        torch.jit.script(encoder).save(tmp_path / "e.ts")
        scripted = torch.jit.load(tmp_path / "e.ts")
        with torch.no_grad():
            features = encoder(images)
            assert features.shape == (3, encoder.embed_dim)
            torch.testing.assert_close(again(images), features)
            torch.testing.assert_close(scripted(images[:2]), features[:2], atol=1e-5, rtol=1e-4)


def test_resnet18_has_torchvisions_parameters() -> None:
    """Its published number of parameters without ``fc``, and the names that its weights come under."""
    network = resnet18()
    assert sum(p.numel() for p in network.parameters()) == 11_689_512 - 512 * 1000 - 1000
    names = set(network.state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer1.1.conv2.weight", "layer4.0.downsample.0.weight"} <= names
    assert network.state_dict()["conv1.weight"].shape == (64, 3, 7, 7)
    assert not [name for name in names if name.endswith("downsample.0.bias")]


def test_with_group_norm_no_image_sees_another() -> None:
    images = torch.randn(4, 3, SIDE, SIDE)
    for net in (resnet10(8, "group"), network(stem_norm="group")):
        net.train()
        with torch.no_grad():
            together, alone = (net(x)[0] if isinstance(net, SRTransformer) else net(x) for x in (images, images[:1]))
        torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"depth": 34}, "depth must be"), ({"width": 20}, "multiple of 8"), ({"norm": "layer"}, "norm must be")],
)
def test_other_resnets_get_a_sentence(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmallResNet(**arguments)  # type: ignore[arg-type]
