"""Every path of sparse attention against the plain reference, forward and gradient."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cytossl_monai.networks.blocks.attention import routed as attention_routed
from cytossl_monai.networks.blocks.attention.reference import attention_mask, num_kept, reference_attention
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention
from cytossl_monai.networks.blocks.token_layout import TokenLayout

RPES = [
    None,
    {"mode": "bias"},
    {"mode": "contextual", "shared_heads": False},
    {"method": "cross", "on": "qkv"},
    {"method": "product", "mode": "contextual", "on": "qkv"},  # as published
    {"method": "euclid", "mode": "bias", "on": "qv"},
]
HEADS, WIDTH = 2, 8


def make(
    sparsity: str, rpe: object, prefix: int, dtype: torch.dtype = torch.float32, **kwargs: object
) -> SparseAttention:
    """``topk 16`` and ``topk 16 all`` are the absolute number of keys, without and with the prefix bound by it."""
    sparsity, *number = sparsity.split()
    if number:
        kwargs = {"num_keys": int(number[0]), "sparse_prefix": number[1:] == ["all"], **kwargs}
    module = SparseAttention(
        HEADS * WIDTH,
        HEADS,
        qkv_bias=True,
        rpe=rpe,  # type: ignore[arg-type]
        sparsity=sparsity,
        has_class_token=prefix > 0,
        has_registers=prefix > 1,
        **{"keep_ratio": 0.3, "num_salient": 6, "window": 2, **kwargs},  # type: ignore[arg-type]
    )
    if module.irpe is not None:
        for table in module.irpe.parameters():
            torch.nn.init.normal_(table, std=0.5)
    torch.nn.init.normal_(module.qkv.weight, std=0.5)
    return module.to(dtype)


def by_reference(module: SparseAttention, x: Tensor, layout: TokenLayout) -> Tensor:
    q, k, v = module.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    out, _ = reference_attention(
        q, k, v, layout, module.irpe, module.sparsity, module.keep_ratio, module.num_salient, module.window,
        module.num_keys, module.sparse_prefix,
    )  # fmt: skip
    return module.out_proj(out.transpose(1, 2).flatten(2))


def gradients(out: Tensor, module: SparseAttention, x: Tensor, weight: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((out.float() * weight).sum(), [x, *module.parameters()]))


@pytest.fixture
def tiles_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use tiles on small grids too, where the dense mask would be cheaper."""
    monkeypatch.setattr(attention_routed, "TILE", 4)
    monkeypatch.setattr("cytossl_monai.networks.blocks.attention.routed.tiles_pay", lambda *_: True)


@pytest.mark.usefixtures("tiles_everywhere")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("rpe", RPES)
@pytest.mark.parametrize("sparsity", ["none", "topk", "topk 16", "topk 16 all", "routed"])
def test_paths_equal_reference(sparsity: str, rpe: object, prefix: int, masked: bool) -> None:
    grid = (9, 6)
    module = make(sparsity, rpe, prefix)
    valid = None
    if masked:
        valid = torch.rand(2, 54) > 0.4
        valid[0] = False
        valid[0, 10:14] = True  # fewer patches than are salient, and than a window holds
    x = torch.randn(2, prefix + 54, HEADS * WIDTH, requires_grad=True)
    weight = torch.randn(2, prefix + 54, HEADS * WIDTH)
    if valid is not None:  # what comes out for a token that takes no part means nothing
        weight[:, prefix:] *= valid.unsqueeze(-1)
    layout = TokenLayout(2, grid, prefix, prefix > 0, valid=valid)
    wanted, got = by_reference(module, x, layout), module(x, layout)
    real = weight.abs().sum(-1) > 0
    torch.testing.assert_close(got[real], wanted[real], atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients(got, module, x, weight), gradients(wanted, module, x, weight)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("tiles_everywhere")
@pytest.mark.parametrize("sparsity", ["none", "topk", "routed"])
def test_bfloat16(sparsity: str) -> None:
    """In bf16 every path stays within bf16's rounding of the float32 reference on the same weights."""
    module = make(sparsity, {"mode": "contextual"}, 1, torch.bfloat16, keep_ratio=1.0)
    x = torch.randn(2, 55, HEADS * WIDTH, dtype=torch.bfloat16, requires_grad=True)
    layout = TokenLayout(2, (9, 6), 1)
    got = module(x, layout)
    assert got.dtype == torch.bfloat16
    wanted = by_reference(module, x, layout)  # the same choice of salient patches: the same bf16 products
    assert (got - wanted).abs().mean() < 0.02 * wanted.abs().mean()
    weight = torch.randn(2, 55, HEADS * WIDTH)
    for a, b in zip(gradients(got, module, x, weight), gradients(wanted, module, x, weight)):
        assert a.dtype == torch.bfloat16
        assert (a - b).abs().mean() < 0.03 * b.abs().mean()


@pytest.mark.usefixtures("tiles_everywhere")
@pytest.mark.parametrize("rpe", RPES)
@pytest.mark.parametrize("sparsity", ["none", "topk", "routed"])
def test_packed_equals_each_image_alone(sparsity: str, rpe: object) -> None:
    """Images of different lengths in one packed batch give what each gives alone."""
    grid, prefix, counts = (9, 6), 2, [54, 3, 17, 20, 1]
    module = make(sparsity, rpe, prefix)
    positions = [torch.randperm(54)[:count].sort().values for count in counts]
    x = torch.randn(sum(counts) + prefix * len(counts), HEADS * WIDTH, requires_grad=True)
    layout = TokenLayout(len(counts), grid, prefix, positions=torch.cat(positions), counts=counts)
    together = module(x, layout)
    alone = []
    for (start, stop), own in zip(pairwise(layout.offsets()), positions):
        single = TokenLayout(1, grid, prefix, positions=own.unsqueeze(0))
        alone.append(by_reference(module, x[start:stop].unsqueeze(0), single)[0])
    wanted = torch.cat(alone)
    torch.testing.assert_close(together, wanted, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(wanted)
    for a, b in zip(gradients(together, module, x, weight), gradients(wanted, module, x, weight)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rpe", RPES)
def test_limits_are_dense(rpe: object) -> None:
    """keep_ratio=1, all patches salient, or a window over the whole grid: each is dense attention."""
    dense = make("none", rpe, 1)
    x = torch.randn(2, 55, HEADS * WIDTH)
    wanted = dense(x, TokenLayout(2, (9, 6), 1))
    for sparsity, changed in (
        ("topk", {"keep_ratio": 1.0}),
        ("routed", {"num_salient": 54, "window": 0}),
        ("routed", {"num_salient": 0, "window": 9}),
    ):
        module = make(sparsity, rpe, 1, **changed)
        module.load_state_dict(dense.state_dict())
        torch.testing.assert_close(module(x, TokenLayout(2, (9, 6), 1)), wanted, atol=1e-5, rtol=1e-5)


def test_topk_keeps_the_number_it_says() -> None:
    module = make("topk", None, 1, save_attn=True)
    module(torch.randn(2, 55, HEADS * WIDTH), TokenLayout(2, (9, 6), 1))
    assert module.att_mat is not None
    kept = (module.att_mat > 0).sum(-1)
    assert kept[:, :, 1:].eq(num_kept(0.3, 54) + 1).all()  # and the class token
    assert kept[:, :, 0].eq(55).all()


@pytest.mark.parametrize(
    ("ratio", "patches", "kept"), [(0.5, 196, 98), (0.3, 54, 17), (1.0, 7, 7), (0.01, 9, 1), (0.1, 10, 1)]
)
def test_num_kept(ratio: float, patches: int, kept: int) -> None:
    assert num_kept(ratio, patches) == kept


def test_routed_sees_window_salient_and_prefix_only() -> None:
    module = make("routed", None, 1, save_attn=True)
    grid = (9, 6)
    module(torch.randn(1, 55, HEADS * WIDTH), TokenLayout(1, grid, 1))
    assert module.att_mat is not None
    seen = module.att_mat[0, 0, 1:, 1:] > 0
    everywhere = set(seen.all(dim=0).nonzero().flatten().tolist())
    assert len(everywhere) == 6
    for i in range(54):
        for j in range(54):
            near = abs(i // 6 - j // 6) <= 2 and abs(i % 6 - j % 6) <= 2
            assert bool(seen[i, j]) == (near or j in everywhere)


@pytest.mark.usefixtures("tiles_everywhere")
def test_saved_attention_of_packed_images_is_on_the_grid() -> None:
    module = make("routed", None, 1, save_attn=True)
    positions = torch.tensor([0, 5, 53, 7, 8])
    module(torch.randn(7, HEADS * WIDTH), TokenLayout(2, (9, 6), 1, positions=positions, counts=[3, 2]))
    assert module.att_mat is not None
    assert module.att_mat.shape == (2, HEADS, 55, 55)
    assert module.att_mat[0].sum(-1).gt(0.99).any(0).nonzero().flatten().tolist() == [0, 1, 6, 54]
    assert module.att_mat[1].sum(-2).gt(0).any(0).nonzero().flatten().tolist() == [0, 8, 9]


def test_dropout_only_in_training() -> None:
    module = make("none", None, 1, dropout_rate=0.5)
    x = torch.randn(2, 55, HEADS * WIDTH)
    assert not torch.equal(module(x, TokenLayout(2, (9, 6), 1)), module(x, TokenLayout(2, (9, 6), 1)))
    module.eval()
    assert torch.equal(module(x, TokenLayout(2, (9, 6), 1)), module(x, TokenLayout(2, (9, 6), 1)))


def test_routed_cost_grows_as_the_tokens() -> None:
    """Products that the routed path computes, counted by torch: linear in N, where the dense path is quadratic."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(sparsity: str, side: int) -> int:
        module = make(sparsity, {"mode": "contextual"}, 1)
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(1, side * side + 1, HEADS * WIDTH), TokenLayout(1, (side, side), 1)).sum().backward()
        return counter.get_total_flops()

    routed, dense = flops("routed", 48), flops("none", 48)
    assert routed < 4.5 * flops("routed", 24)
    assert dense > 10 * flops("none", 24)
    assert routed < dense / 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": "local"}, "sparsity"),
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"keep_ratio": 1.5}, "keep_ratio"),
        ({"num_salient": -1}, "num_salient"),
        ({"num_heads": 3}, "divisible"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
        ({"rpe": "polar"}, "rpe method"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAttention(**{"hidden_size": 16, "num_heads": 2, **arguments})  # type: ignore[arg-type]


def test_wrong_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="54 tokens were given"):
        make("none", None, 1)(torch.randn(1, 54, 16), TokenLayout(1, (9, 6), 1))


def test_mask_of_reference_needs_no_scores_for_routed() -> None:
    q = torch.randn(1, 2, 55, 8)
    layout = TokenLayout(1, (9, 6), 1)
    a = attention_mask(torch.zeros(1, 2, 55, 55), q, q, layout, "routed", num_salient=3, window=1)
    b = attention_mask(torch.randn(1, 2, 55, 55), q, q, layout, "routed", num_salient=3, window=1)
    assert torch.equal(a, b)


@pytest.mark.parametrize(("grid", "window", "num_salient"), [((4, 3), 3, 2), ((6, 5), 1, 30), ((2, 7), 6, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_where_every_patch_sees_every_other_nothing_is_looked_for(
    grid: tuple[int, int], window: int, num_salient: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients are those of the reference, and no mask is made."""
    from cytossl_monai.networks.blocks import sparse_attention as module

    torch.manual_seed(0)
    cells = grid[0] * grid[1]
    attention = SparseAttention(
        24, 3, rpe={"method": "product", "on": "qk"}, sparsity="routed", num_salient=num_salient, window=window
    ).double()
    for name, parameter in attention.named_parameters():
        if "irpe" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    layout = TokenLayout(2, grid, 1)
    tokens = torch.randn(2, 1 + cells, 24, dtype=torch.float64, requires_grad=True)
    if packed:
        layout = TokenLayout(2, grid, 1, positions=torch.arange(cells).repeat(2), counts=[cells, cells])
    monkeypatch.setattr(module, "attention_mask", lambda *_, **__: pytest.fail("a mask was made"))
    out = attention(tokens.flatten(0, 1) if packed else tokens, layout).view(2, 1 + cells, 24)
    query, key, value = attention.qkv(tokens).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    settings = (attention.irpe, "routed", 1.0, num_salient, window)
    expected = reference_attention(query, key, value, TokenLayout(2, grid, 1), *settings)[0]
    expected = attention.out_proj(expected.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected)
    mixed = torch.randn_like(out)
    parameters = [tokens, *attention.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((out * mixed).sum(), parameters),
        torch.autograd.grad((expected * mixed).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
