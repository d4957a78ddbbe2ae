"""iRPE against the paper's equations, written once more in plain Python loops."""

from __future__ import annotations

import math

import pytest
import torch

from cytossl_monai.networks.blocks.attention.reference import reference_attention
from cytossl_monai.networks.blocks.irpe import IRPE, METHODS, MODES, RPEConfig, piecewise_index
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention
from cytossl_monai.networks.blocks.token_layout import TokenLayout

GRIDS = [(7, 7), (14, 14), (16, 10)]


def g(x: float, ratio: float) -> int:
    """Equation (18) of the paper, with the authors' way of cutting a beta that is no integer."""
    alpha, beta, gamma = ratio, 2 * ratio, 8 * ratio
    if abs(x) <= alpha:
        return round(x)
    size = round(alpha + math.log(abs(x) / alpha) / math.log(gamma / alpha) * (beta - alpha))
    return int(math.copysign(min(beta, size), x))


def naive_bucket(method: str, dy: int, dx: int, ratio: float, ranks: dict[int, int]) -> int:
    last = int(2 * ratio)
    if method in ("product", "cross"):
        return (g(dy, ratio) + last) * (2 * last + 1) + g(dx, ratio) + last
    if method == "euclid":
        return g(round(math.sqrt(dy * dy + dx * dx)), ratio) + last
    if method == "quant":
        return g(ranks[dy * dy + dx * dx], ratio) + last
    return g(dy * dy + dx * dx, ratio) + last


@pytest.fixture(scope="module")
def ranks() -> dict[int, int]:
    squares = sorted({a * a + b * b for a in range(40) for b in range(40)})
    return {square: rank for rank, square in enumerate(squares)}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [1.0, 1.9, 3.0])
def test_bucket_ids(grid: tuple[int, int], method: str, ratio: float, ranks: dict[int, int]) -> None:
    layout = TokenLayout(1, grid, 0, False)
    irpe = IRPE(RPEConfig(method, ratio=ratio), 4, 2, False, False)
    ids = irpe.pair_buckets(*layout.rows_and_cols(torch.device("cpu")), 0).tolist()
    width = grid[1]
    for i in range(grid[0] * width):
        for j in range(grid[0] * width):
            dy, dx = i // width - j // width, i % width - j % width
            assert ids[i][j] == naive_bucket(method, dy, dx, ratio, ranks)
    assert max(max(row) for row in ids) < irpe.num_buckets


def test_bucket_counts_of_the_paper() -> None:
    """The paper's best model (product, ratio 1.9) has 49 buckets, and 50 with the class token's."""
    assert IRPE(RPEConfig(), 4, 2, False, False).num_buckets == 49
    assert IRPE(RPEConfig(), 4, 2, True, False).num_buckets == 50
    assert IRPE(RPEConfig(), 4, 2, True, True).num_buckets == 51
    assert IRPE(RPEConfig("euclid"), 4, 2, True, False).num_buckets == 8


def test_piecewise_index_is_odd_monotonic_and_saturates() -> None:
    x = torch.arange(-60, 61).numpy()
    index = piecewise_index(x, 1.9, 3.8, 15.2)
    assert (index == -index[::-1]).all()
    assert (index[1:] >= index[:-1]).all()
    assert index.max() == 3
    # The published indices at ratio 1.9: 0, 1, 2, 2, 3, 3 ...
    assert index[60:66].tolist() == [0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("far", [16, 40, 1000])
def test_far_offsets_share_the_rim(far: int) -> None:
    for method in METHODS:
        irpe = IRPE(RPEConfig(method), 4, 2)
        near = irpe.buckets(torch.tensor(16), torch.tensor(0))
        assert irpe.buckets(torch.tensor(far), torch.tensor(0)) == near


def test_prefix_buckets() -> None:
    """Pairs with the class token fall in its bucket, other pairs with a register in the registers'."""
    irpe = IRPE(RPEConfig(), 4, 2, True, True)
    ids = irpe.pair_buckets(torch.tensor([0, 0]), torch.tensor([0, 1]), 3)
    assert ids[0].tolist() == [49] * 5
    assert ids[:, 0].tolist() == [49] * 5
    assert ids[1:3, 1:].eq(50).all()
    assert ids[3:, 1:3].eq(50).all()
    assert ids[3:, 3:].max() < 49


def naive_attention(q, k, v, irpe: IRPE, grid, has_cls, ranks):  # type: ignore[no-untyped-def]
    """Equations (5) to (12): a loop over heads, queries and keys; one token sequence, tensors (h, L, d)."""
    config, heads, width = irpe.config, q.shape[0], q.shape[2]
    side, last = config.side, int(2 * config.ratio)

    def vector(table, h, i, j):  # type: ignore[no-untyped-def]
        own = table[0 if config.shared_heads else h]
        spatial = side * side if config.method in ("product", "cross") else side
        if has_cls and (i == 0 or j == 0):
            return own[2 * side] if config.method == "cross" else own[spatial]
        a, b = i - has_cls, j - has_cls
        dy, dx = a // grid[1] - b // grid[1], a % grid[1] - b % grid[1]
        if config.method == "cross":
            return own[g(dy, config.ratio) + last] + own[side + g(dx, config.ratio) + last]
        return own[naive_bucket(config.method, dy, dx, config.ratio, ranks)]

    outputs = []
    for h in range(heads):
        for i in range(q.shape[1]):
            scores = []
            for j in range(q.shape[1]):
                score = q[h, i] @ k[h, j] / math.sqrt(width)
                if irpe.key_table is not None:
                    r = vector(irpe.key_table, h, i, j)
                    score = score + (r if config.mode == "bias" else q[h, i] @ r / math.sqrt(width))
                if irpe.query_table is not None:
                    r = vector(irpe.query_table, h, i, j)
                    score = score + (r if config.mode == "bias" else k[h, j] @ r / math.sqrt(width))
                scores.append(score)
            weights = torch.stack(scores).softmax(0)
            out = torch.zeros(width)
            for j in range(q.shape[1]):
                value = v[h, j]
                if irpe.value_table is not None:
                    value = value + vector(irpe.value_table, h, i, j)
                out = out + weights[j] * value
            outputs.append(out)
    return torch.stack(outputs).view_as(q)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on", ["k", "qk", "qkv", "v"])
@pytest.mark.parametrize("method", METHODS)
def test_attention_equals_triple_loop(method: str, mode: str, on: str, ranks: dict[int, int]) -> None:
    """Forward and gradients of the reference and of the module's own path."""
    grid, heads, width, has_cls = (3, 4), 2, 4, method != "quant"
    shared = method in ("product", "euclid")
    module = SparseAttention(
        heads * width, heads, rpe=RPEConfig(method, mode, on, shared_heads=shared), has_class_token=has_cls
    )
    irpe = module.irpe
    assert irpe is not None
    for table in irpe.parameters():
        torch.nn.init.normal_(table)
    length = 12 + has_cls
    layout = TokenLayout(1, grid, int(has_cls), has_cls)
    x = torch.randn(1, length, 8)
    weight = torch.randn(1, heads, length, width)

    qkv = module.qkv(x).view(1, length, 3, heads, width).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.detach().requires_grad_().unbind(0)
    for t in (q, k, v):
        t.retain_grad()
    leaves = [q, k, v, *irpe.parameters()]
    naive = naive_attention(q[0], k[0], v[0], irpe, grid, has_cls, ranks).unsqueeze(0)
    wanted = torch.autograd.grad((naive * weight).sum(), leaves)

    plain, _ = reference_attention(q, k, v, layout, irpe)
    torch.testing.assert_close(plain, naive, atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad((plain * weight).sum(), leaves)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)

    stacked = torch.stack([q, k, v], dim=0).permute(1, 3, 0, 2, 4)  # (B, L, 3, h, d)
    fast = module._batched(stacked, TokenLayout(1, grid, int(has_cls), has_cls))
    torch.testing.assert_close(fast, naive.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5)
    got = torch.autograd.grad((fast.view(1, length, heads, width).transpose(1, 2) * weight).sum(), leaves)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "polar"},
        {"mode": "ctx"},
        {"on": ""},
        {"on": "kk"},
        {"on": "x"},
        {"ratio": 0},
        {"methd": "product"},
    ],
)
def test_bad_configuration(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="rpe"):
        RPEConfig.parse(arguments)


def test_parse() -> None:
    assert RPEConfig.parse(None) is None
    assert RPEConfig.parse("none") is None
    assert RPEConfig.parse("cross") == RPEConfig("cross")
    assert RPEConfig.parse({"method": "euclid", "on": "qk"}) == RPEConfig("euclid", on="qk")
    assert RPEConfig.parse({True: "qk"}) == RPEConfig(on="qk")  # what YAML makes of a bare `on`
    with pytest.raises(ValueError, match="mapping"):
        RPEConfig.parse(3)  # type: ignore[arg-type]
