"""SRTransformer: MONAI's ViT where it should be one, and what it adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import ViT
from tiny_encoders import SMALL_VIT, small_vit
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import cytossl_monai  # noqa: F401 - registers the short names
from cytossl_monai.networks.blocks.attention import routed as attention_routed
from cytossl_monai.networks.blocks.token_layout import TokenLayout
from cytossl_monai.networks.nets.sr_presets import sr_vit_base, sr_vit_small, sr_vit_tiny, vit_small
from cytossl_monai.networks.nets.sr_transformer import SRTransformer

RPE = {"method": "product", "mode": "contextual", "on": "qk"}


def small(**changes: Any) -> SRTransformer:
    """Two layers on a 4 x 4 grid, with tables of iRPE that are not zero."""
    network = small_vit(**{"num_salient": 3, "window": 1, "keep_ratio": 0.4, **changes})
    for name, parameter in network.named_parameters():
        if ".irpe." in name:
            nn.init.normal_(parameter, std=0.3)
    return network


@pytest.fixture
def tiles_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the tiles of routed attention on small grids too."""
    monkeypatch.setattr(attention_routed, "TILE", 2)
    monkeypatch.setattr("cytossl_monai.networks.blocks.attention.routed.tiles_pay", lambda *_: True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classification": True, "num_classes": 5},
        {"classification": True, "post_activation": "none", "qkv_bias": True, "save_attn": True},
        {"img_size": (32, 48), "patch_size": (8, 16), "pos_embed_type": "sincos", "hidden_size": 36},
        {"proj_type": "perceptron", "pos_embed_type": "none"},
    ],
)
def test_is_monais_vit_on_its_weights(changes: dict[str, Any]) -> None:
    arguments = {**SMALL_VIT, "num_layers": 3, "spatial_dims": 2, **changes}
    theirs = ViT(**arguments).eval()
    for parameter in theirs.parameters():  # MONAI starts some of them at zero
        nn.init.normal_(parameter, std=0.2)
    ours = SRTransformer(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    size = changes.get("img_size", (32, 32))
    images = torch.rand(2, 3, *size)
    (wanted, wanted_hidden), (got, hidden) = theirs(images), ours(images)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert len(hidden) == len(wanted_hidden) == 3
    for a, b in zip(hidden, wanted_hidden):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if changes.get("save_attn"):
        for mine, other in zip(ours.blocks, theirs.blocks):
            torch.testing.assert_close(mine.attn.att_mat, other.attn.att_mat, atol=1e-5, rtol=1e-5)


def test_layers_differ_by_list() -> None:
    rpe = [None, "euclid", {"method": "cross", "mode": "bias", "on": "v"}]
    network = small(num_layers=3, rpe=rpe, sparsity=["none", "topk", "routed"])
    assert [block.attn.sparsity for block in network.blocks] == ["none", "topk", "routed"]
    assert network.blocks[0].attn.irpe is None
    assert [block.attn.irpe.config.method for block in network.blocks[1:]] == ["euclid", "cross"]
    again = SRTransformer(**network.config)
    again.load_state_dict(network.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.eval()(images)[0], network.eval()(images)[0])


def test_other_sizes_need_no_change_without_absolute_positions() -> None:
    """iRPE alone: a network made for another size, with these weights, gives the same."""
    network = small(pos_embed_type="none", rpe=RPE).eval()
    other = small(pos_embed_type="none", rpe=RPE, img_size=(48, 24)).eval()
    state = {name: value for name, value in network.state_dict().items() if "position_embeddings" not in name}
    assert other.load_state_dict(state, strict=False).missing_keys == ["patch_embedding.position_embeddings"]
    images = torch.rand(2, 3, 48, 24)
    assert torch.equal(network(images)[0], other(images)[0])


def test_other_sizes_interpolate_absolute_positions() -> None:
    network = small()
    table = network.patch_embedding.position_embeddings
    assert network.patch_embedding.positions((4, 4)) is table
    with torch.no_grad():  # positions that grow evenly with the row stay so on another grid, but for its rim
        table.copy_(torch.arange(4.0).repeat_interleave(4).view(1, 16, 1).expand_as(table))
    rows = network.patch_embedding.positions((8, 4))[0, :, 0].view(8, 4)
    torch.testing.assert_close(rows[3:5].mean(), torch.tensor(1.5))
    assert (rows[1:] > rows[:-1]).all()
    assert network(torch.rand(1, 3, 64, 32))[0].shape == (1, 33, 24)


# Parameters of timm's vit_{tiny,small,base}_patch16_224 without heads; its class token has a position as well.
@pytest.mark.parametrize(
    ("make", "count"), [(sr_vit_tiny, 5_524_416), (sr_vit_small, 21_665_664), (sr_vit_base, 85_798_656)]
)
def test_presets_have_the_published_sizes(make: Any, count: int) -> None:
    with torch.device("meta"):
        network, plain, fine = make(), make(rpe=None, sparsity="none"), make(patch_size=8)
    assert sum(p.numel() for p in plain.parameters()) == count - plain.hidden_size
    assert sum(p.numel() for n, p in network.named_parameters() if ".irpe." not in n) == count - plain.hidden_size
    assert {(b.attn.sparsity, b.attn.num_keys, b.attn.sparse_prefix) for b in network.blocks} == {("topk", 16, True)}
    assert network.config["pos_embed_type"] == "learnable"
    assert network.blocks[0].attn.irpe.config.num_spatial_buckets == 49
    assert fine.patch_embedding.grid == (28, 28)


def test_baseline_is_dense() -> None:
    with torch.device("meta"):
        network = vit_small()
    assert all(block.attn.irpe is None and block.attn.sparsity == "none" for block in network.blocks)


FOREGROUND = torch.zeros(3, 16, dtype=torch.bool)
FOREGROUND[0, [0, 5, 6, 15]] = True
FOREGROUND[1, 3] = True
FOREGROUND[2, :13] = True


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("sparsity", ["none", "topk", "routed"])
def test_dropped_background_is_as_if_it_were_not_there(
    sparsity: str, tiled: bool, request: pytest.FixtureRequest
) -> None:
    """A batch of images with 4, 1 and 13 patches gives what each gives alone with those tokens only."""
    if tiled:
        request.getfixturevalue("tiles_everywhere")
    network = small(rpe=RPE, sparsity=sparsity, num_register_tokens=2)
    images = torch.rand(3, 3, 32, 32)
    tokens, hidden = network(images, foreground=FOREGROUND)
    assert tokens.shape == (3, 3 + 16, 24)
    for layer in (tokens, *hidden):
        assert (layer[:, 3:][~FOREGROUND] == 0).all()
        assert (layer[:, 3:][FOREGROUND].abs().sum(-1) > 0).all()
    loss, alone = 0.0, 0.0
    for i, mask in enumerate(FOREGROUND):
        places = mask.nonzero().T
        single = network.forward_features(images[i : i + 1], keep=places)
        torch.testing.assert_close(tokens[i, 0], single.cls[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens[i, 1:3], single.registers[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens[i, 3:][mask], single.patches[0], atol=1e-5, rtol=1e-5)
        alone = alone + single.patches.square().sum() + single.cls.sum()
    loss = tokens[:, 3:].square().sum() + tokens[:, 0].sum()
    parameters = [p for p in network.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(alone, parameters)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_mask_that_keeps_all_changes_nothing() -> None:
    network = small(rpe=RPE, sparsity="routed").eval()
    images = torch.rand(2, 3, 32, 32)
    everything = torch.ones(2, 16, dtype=torch.bool)
    assert torch.equal(network(images, foreground=everything)[0], network(images)[0])


def test_work_follows_the_cells_not_the_area() -> None:
    """30 % of the patches: at most 36 % of the products of the blocks, whatever the counts of the images."""
    network = small(img_size=128, num_layers=4, drop_background=True)
    foreground = torch.zeros(4, 256, dtype=torch.bool)
    for i, count in enumerate((20, 40, 90, 157)):  # 30 % of 1,024 in all
        foreground[i, torch.randperm(256)[:count]] = True

    def flops(mask: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            network.forward_features(torch.rand(4, 3, 128, 128), foreground=mask)
        return counter.get_flop_counts()["Global"][torch.ops.aten.addmm]  # the linear layers

    assert flops(foreground) < 0.36 * flops(torch.ones_like(foreground))


def test_drop_background_finds_the_glass_itself() -> None:
    images = torch.full((2, 3, 32, 32), 0.95)
    images[0, :, 8:16, 8:24] = 0.4  # patches 5 and 6
    images[1, :, 24:, :8] = 0.5  # patch 12
    network = small(drop_background=True).eval()
    features = network.forward_features(images)
    assert features.foreground is not None
    assert [row.nonzero().flatten().tolist() for row in features.foreground] == [[5, 6], [12]]
    masked = network(images, foreground=features.foreground)[0]
    assert torch.equal(network(images)[0], masked)
    # What the blank patches hold does not matter.
    again = network.forward_features(torch.where(images > 0.9, 0.93, images), foreground=features.foreground)
    assert torch.equal(again.cls, features.cls)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("sparsity", ["none", "topk", "routed"])
@pytest.mark.usefixtures("tiles_everywhere")
def test_attention_maps_are_there_on_every_path(sparsity: str, dropped: bool) -> None:
    """The saved map, applied to the values, gives what the kernel gave."""
    network = small(rpe=RPE, sparsity=sparsity, save_attn=True, num_layers=1).eval()
    block, seen = network.blocks[0], {}
    block.attn.qkv.register_forward_hook(lambda _, args, out: seen.update(qkv=out))
    block.attn.out_proj.register_forward_hook(lambda _, args, out: seen.update(mixed=args[0]))
    network(torch.rand(3, 3, 32, 32), foreground=FOREGROUND if dropped else None)
    maps = block.attn.att_mat
    assert maps.shape == (3, 3, 17, 17)
    assert not maps.requires_grad
    places = torch.cat([torch.ones(3, 1, dtype=torch.bool), FOREGROUND], dim=1) if dropped else None
    values, mixed = seen["qkv"][..., 48:], seen["mixed"]
    if places is not None:
        values = values.new_zeros(3, 17, 24).index_put((places,), values)
        mixed = mixed.new_zeros(3, 17, 24).index_put((places,), mixed)
    by_map = maps @ values.unflatten(-1, (3, 8)).transpose(1, 2)
    torch.testing.assert_close(by_map.transpose(1, 2).flatten(2), mixed, atol=1e-5, rtol=1e-5)


def test_nothing_is_drawn_in_eval() -> None:
    noisy = small(rpe=RPE, dropout_rate=0.4, drop_path_rate=0.4, sparsity="topk")
    plain = small(rpe=RPE, sparsity="topk").eval()
    plain.load_state_dict(noisy.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(noisy.eval()(images)[0], plain(images)[0])
    noisy.train()
    assert not torch.equal(noisy(images)[0], noisy(images)[0])


def test_drop_path_drops_whole_images_at_their_rate() -> None:
    network = small(num_layers=1, drop_path_rate=0.0)
    drop = network.blocks[0].drop_path
    drop.rate = 0.25
    drop.train()
    out = drop(torch.ones(4000, 2, 3), TokenLayout(4000, (1, 2), 0, False))
    assert ((out == 0) | (out - 4 / 3).abs().lt(1e-6)).all()
    assert (out == out[:, :1, :1]).all()
    assert out.mean() == pytest.approx(1.0, abs=0.05)


EVERYTHING = [
    {"rpe": {**RPE, "on": "qkv"}, "sparsity": ["none", "topk", "routed"], "num_layers": 3, "num_register_tokens": 2},
    {"rpe": {"method": "cross", "mode": "bias", "on": "qk"}, "layer_scale": 0.1, "drop_path_rate": 0.2},
    {"classification": True, "qkv_bias": True, "sparsity": "topk"},
    {"pos_embed_type": "none", "class_token": False},
]


@pytest.mark.parametrize("changes", EVERYTHING)
def test_every_parameter_learns(changes: dict[str, Any]) -> None:
    network = small(**changes)
    out, _ = network(torch.rand(4, 3, 32, 32))
    out.square().sum().backward()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert [name for name, p in trained.items() if p.grad is not None and not p.grad.any()] == []


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_trains_under_ddp_without_looking_for_unused_parameters() -> None:
    def train(network: nn.Module) -> None:
        wrapped = DistributedDataParallel(network, find_unused_parameters=False)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(torch.rand(2, 3, 32, 32))[0].square().mean().backward()
            optimizer.step()

    train(small(**EVERYTHING[0]))
    train(small(**EVERYTHING[1], checkpoint_activations=True))
    with pytest.raises(RuntimeError, match="prior iteration"):  # MONAI's own has parameters that it never uses
        train(ViT(**SMALL_VIT, num_layers=2, spatial_dims=2))


def test_compiles_without_graph_breaks() -> None:
    network = small(rpe=RPE, sparsity=["none", "topk", "routed"], num_layers=3)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    images = torch.rand(2, 3, 32, 32)
    (got, _), (wanted, _) = compiled(images), network(images)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    parameters = [p for p in network.parameters() if p.requires_grad]
    got, wanted = (torch.autograd.grad(out.square().sum(), parameters) for out in (got, wanted))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dropped", [False, True])
def test_checkpointing_changes_no_gradient(dropped: bool) -> None:
    plain = small(rpe=RPE, sparsity="routed", dropout_rate=0.1)
    saving = small(rpe=RPE, sparsity="routed", dropout_rate=0.1, checkpoint_activations=True)
    saving.load_state_dict(plain.state_dict())
    images, gradients, saved = torch.rand(3, 3, 32, 32), [], []
    for network in (plain, saving):
        torch.manual_seed(1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            out, _ = network(images, foreground=FOREGROUND if dropped else None)
        out.square().sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
        saved.append(sum(kept))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    assert saved[1] < saved[0] / 3


@pytest.mark.parametrize("sparsity", ["none", "topk", "routed"])
def test_bfloat16_autocast_stays_close(sparsity: str) -> None:
    network = small(rpe=RPE, sparsity=sparsity, keep_ratio=1.0, num_salient=16).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(images)[0]
    wanted = network(images)[0]
    assert (half.float() - wanted).abs().mean() < 0.03 * wanted.abs().mean()


@pytest.mark.parametrize("target", ["cytossl_monai.networks.nets.sr_transformer.SRTransformer", "SRTransformer"])
def test_resolves_in_a_bundle_config(target: str) -> None:
    parser = ConfigParser(
        {
            "imports": ["$import cytossl_monai"],
            "network_def": {"_target_": target, **SMALL_VIT, "num_layers": 2, "sparsity": "topk", "rpe": {"on": "qk"}},
        }
    )
    network = parser.get_parsed_content("network_def")
    assert isinstance(network, SRTransformer)
    assert network.blocks[1].attn.irpe.config.on == "qk"


@pytest.mark.parametrize("name", ["sr_vit_tiny", "sr_vit_small", "vit_small"])
def test_presets_resolve_by_short_name(name: str) -> None:
    parser = ConfigParser({"imports": ["$import cytossl_monai"], "net": {"_target_": name, "num_layers": 1}})
    assert isinstance(parser.get_parsed_content("net"), SRTransformer)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"img_size": 30}, ["patch_size (8, 8)", "img_size (30, 30)"]),
        ({"patch_size": (8, 8, 8)}, ["patch_size", "(8, 8, 8)"]),
        ({"keep_ratio": 0.0}, ["keep_ratio", "(0, 1]", "0.0"]),
        ({"keep_ratio": 1.2}, ["keep_ratio", "(0, 1]", "1.2"]),
        ({"sparsity": "routed", "num_salient": 17}, ["num_salient 17", "16 patches"]),
        ({"sparsity": "local"}, ["none, topk, routed", "'local'"]),
        ({"sparsity": ["none"]}, ["sparsity", "2", "1"]),
        ({"rpe": "polar"}, ["product", "'polar'"]),
        ({"rpe": {"mode": "relative"}}, ["bias, contextual", "'relative'"]),
        ({"rpe": {"kind": "product"}}, ["['kind']", "method"]),
        ({"rpe": [None]}, ["rpe", "2", "1"]),
        ({"drop_background": {"level": 1}}, ["['level']", "threshold, glass, on_blank"]),
        ({"drop_background": -0.1}, ["above 0", "-0.1"]),
        ({"drop_path_rate": 1.0}, ["[0, 1)", "1.0"]),
        ({"dropout_rate": -0.5}, ["-0.5"]),
        ({"spatial_dims": 3}, ["spatial_dims=2", "3"]),
        ({"num_layers": 0}, ["num_layers", "0"]),
        ({"num_heads": 5}, ["24", "5"]),
        ({"classification": True, "class_token": False}, ["class_token"]),
        ({"pos_embed_type": "rotary"}, ["rotary"]),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        small(**changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.rand(1, 3, 30, 32)}, ["30 x 32", "8 x 8"]),
        ({"x": torch.rand(3, 32, 32)}, ["(B, C, H, W)", "(3, 32, 32)"]),
        ({"foreground": torch.ones(1, 15, dtype=torch.bool)}, ["bool", "(1, 16)", "(1, 15)"]),
        ({"foreground": torch.ones(1, 16)}, ["bool", "float32"]),
        ({"foreground": torch.zeros(1, 16, dtype=torch.bool)}, ["[0]", "blank"]),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        small()(**{"x": torch.rand(1, 3, 32, 32), **arguments})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mask": torch.ones(1, 4, 4, dtype=torch.bool)}, ["mask", "(1, 16)", "(1, 4, 4)"]),
        ({"mask": torch.ones(1, 16, dtype=torch.bool)}, ["mask_token"]),
        ({"keep": torch.zeros(1, 17, dtype=torch.long)}, ["1 to 16", "(1, 17)"]),
        ({"keep": torch.zeros(1, 3)}, ["int64", "float32"]),
        (
            {"keep": torch.zeros(1, 3, dtype=torch.long), "foreground": torch.ones(1, 16, dtype=torch.bool)},
            ["keep or foreground"],
        ),
    ],
)
def test_bad_masks_are_named(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        small().forward_features(torch.rand(1, 3, 32, 32), **arguments)
    for word in words:
        assert word in str(caught.value)


def test_an_absolute_number_of_keys() -> None:
    network = sr_vit_tiny(img_size=96, num_layers=1, save_attn=True).eval()
    for side, tokens in ((96, 37), (64, 17)):
        network(torch.rand(1, 3, side, side))
        kept = (network.blocks[0].attn.att_mat > 0).sum(-1)
        assert kept.eq(16).all()  # whatever the grid, and of the class token's row as well
        assert kept.shape[-1] == tokens
    with pytest.raises(ValueError, match=r"num_keys 16 exceeds the 10 tokens of an image of 3 x 3 patches"):
        network(torch.rand(1, 3, 48, 48))
    with pytest.raises(ValueError, match=r"num_keys 16 exceeds the 5 tokens"):
        sr_vit_tiny(img_size=32)
    with pytest.raises(ValueError, match="num_keys must be at least 1"):
        sr_vit_tiny(num_keys=0)
    few = torch.zeros(1, 36, dtype=torch.bool)
    few[:, :5] = True  # of an image whose rest is glass all are kept
    assert torch.isfinite(network(torch.rand(1, 3, 96, 96), foreground=few)[0]).all()


def test_a_file_of_before_means_what_it_meant() -> None:
    old = SRTransformer(3, 64, 16, 24, 48, 1, 3, class_token=True, sparsity="topk", keep_ratio=0.5, rpe="product")
    config = {name: value for name, value in old.config.items() if name not in ("num_keys", "sparse_prefix")}
    again = SRTransformer(**config)
    attention = again.blocks[0].attn
    assert (attention.num_keys, attention.sparse_prefix, attention.irpe.config.on) == (None, False, "k")
    again.load_state_dict(old.state_dict())
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(again.eval()(images)[0], old.eval()(images)[0])
