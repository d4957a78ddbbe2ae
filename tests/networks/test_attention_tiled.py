"""Routed attention by kernels of our own against the plain reference and the tiles; and that GPUs' compilers take them.

Without a GPU Triton's interpreter runs the kernels on the CPU: right results, no word on speed.
"""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_kernels import WANTED, compiled_ahead, device_of_kernels

from cytossl_monai.networks.blocks import sparse_attention
from cytossl_monai.networks.blocks.attention.in_triton import tiled, tiled_ops
from cytossl_monai.networks.blocks.attention.in_triton.tiled import make_plan, tiled_pays, tiled_routed_attention
from cytossl_monai.networks.blocks.attention.reference import reference_attention
from cytossl_monai.networks.blocks.attention.routed import routed_attention
from cytossl_monai.networks.blocks.irpe import IRPE, RPEConfig
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention
from cytossl_monai.networks.blocks.token_layout import TokenLayout

HEADS, WIDTH = 2, 16


@pytest.fixture
def device() -> torch.device:
    torch.set_float32_matmul_precision("highest")
    return device_of_kernels()


@pytest.fixture
def long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps of the kernels' loops: the interpreter takes its time for each."""
    if not torch.cuda.is_available():
        longer = {name: tiled_ops.Launch(64, 4, 1) for name in tiled_ops.LAUNCHES}
        monkeypatch.setattr(tiled_ops, "LAUNCHES", longer)


@dataclass(frozen=True)
class Case:
    grid: tuple[int, int]
    prefix: int
    window: int
    salient: int
    rpe: dict[str, object] | None = None
    masked: bool = False

    def encoding(self, device: torch.device) -> IRPE | None:
        if self.rpe is None:
            return None
        irpe = IRPE(RPEConfig(**self.rpe), WIDTH, HEADS, self.prefix > 0, self.prefix > 1)  # type: ignore[arg-type]
        for table in irpe.parameters():
            torch.nn.init.normal_(table, std=0.5)
        return irpe.to(device)

    def layout(self, valid: Tensor | None = None) -> TokenLayout:
        return TokenLayout(2, self.grid, self.prefix, self.prefix > 0, valid=valid)


def by_reference(qkv: Tensor, layout: TokenLayout, irpe: IRPE | None, window: int, salient: int) -> Tensor:
    batched = qkv.unflatten(0, (layout.batch, -1)).permute(2, 0, 3, 1, 4)
    out, _ = reference_attention(*batched, layout, irpe, "routed", num_salient=salient, window=window)
    return out.transpose(1, 2).flatten(0, 1)


def gradients(out: Tensor, weight: Tensor, qkv: Tensor, irpe: IRPE | None) -> list[Tensor]:
    parameters = [] if irpe is None else list(irpe.parameters())
    return list(torch.autograd.grad((out.float() * weight).sum(), [qkv, *parameters]))


def compare(case: Case, device: torch.device) -> None:
    """Outputs, and gradients of queries, keys, values and every table."""
    cells = case.grid[0] * case.grid[1]
    tokens = 2 * (case.prefix + cells)
    qkv = torch.randn(tokens, 3, HEADS, WIDTH, device=device, requires_grad=True)
    weight = torch.randn(tokens, HEADS, WIDTH, device=device)
    valid = None
    if case.masked:
        valid = torch.rand(2, cells, device=device) > 0.4
        valid[0, 7:] = False  # fewer patches than are salient, and tiles without any
        valid[0, 3] = True
        weight.unflatten(0, (2, -1))[:, case.prefix :][~valid] = 0
    irpe, settings = case.encoding(device), (case.window, case.salient)
    got = tiled_routed_attention(*qkv.unbind(1), case.layout(valid), irpe, *settings)
    wanted = by_reference(qkv, case.layout(valid), irpe, *settings)
    tiles = routed_attention(*qkv.unbind(1), case.layout(valid), irpe, *settings)
    real = weight.abs().sum(dim=(1, 2)) > 0
    torch.testing.assert_close(got[real], wanted[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, tiles, atol=1e-5, rtol=1e-5)  # zero where nothing takes part
    own = gradients(got, weight, qkv, irpe)
    for other in (wanted, tiles):
        for a, b in zip(own, gradients(other, weight, qkv, irpe)):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


CASES = [
    Case((9, 6), 1, 2, 6),
    Case((9, 6), 0, 2, 6, masked=True),
    Case((8, 8), 3, 1, 0),
    Case((9, 6), 0, 1, 6, {"on": "k"}),
    Case((9, 6), 1, 2, 6, {"on": "k", "shared_heads": False}),
    Case((9, 6), 3, 2, 6, {"on": "k"}, masked=True),
    Case((9, 6), 1, 3, 6, {"on": "q"}),
    Case((9, 6), 3, 2, 6, {"on": "qk", "shared_heads": False}, masked=True),
    Case((9, 6), 1, 2, 70, {"on": "qk", "method": "cross"}),  # more than there are patches
    Case((9, 6), 2, 4, 6, {"on": "qk", "method": "euclid", "ratio": 0.7}),  # offsets beyond its reach
    Case((9, 6), 1, 2, 6, {"mode": "bias"}),
    Case((9, 6), 3, 2, 6, {"mode": "bias", "on": "qk", "shared_heads": False}, masked=True),
    Case((17, 3), 2, 1, 5, {"on": "qk"}),
]


@pytest.mark.usefixtures("long_steps")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case: Case, device: torch.device) -> None:
    compare(case, device)


@pytest.mark.usefixtures("long_steps")
@pytest.mark.parametrize("seed", range(4))
def test_equals_reference_by_chance(seed: int, device: torch.device) -> None:
    draw = random.Random(seed)
    rpe = {
        "method": draw.choice(["product", "cross", "quant"]),
        "mode": draw.choice(["bias", "contextual"]),
        "on": draw.choice(["q", "k", "qk"]),
        "shared_heads": draw.random() < 0.5,
    }
    grid = (draw.randint(1, 14), draw.randint(1, 14))
    compare(Case(grid, draw.randint(0, 3), draw.randint(1, 4), draw.randint(0, 12), rpe, draw.random() < 0.5), device)


def test_equals_reference_in_steps_as_on_a_gpu(device: torch.device) -> None:
    compare(Case((9, 6), 2, 2, 6, {"on": "qk"}), device)


@pytest.mark.usefixtures("long_steps")
@pytest.mark.parametrize("rpe", [None, {"on": "qk"}])
def test_packed_equals_each_image_alone(rpe: dict[str, object] | None, device: torch.device) -> None:
    counts, case = [54, 3, 17, 1], Case((9, 6), 2, 2, 6, rpe)
    irpe = case.encoding(device)
    positions = [torch.randperm(54, device=device)[:count].sort().values for count in counts]
    qkv = torch.randn(sum(counts) + 2 * len(counts), 3, HEADS, WIDTH, device=device, requires_grad=True)
    weight = torch.randn(len(qkv), HEADS, WIDTH, device=device)
    layout = TokenLayout(len(counts), case.grid, 2, positions=torch.cat(positions), counts=counts)
    alone = []
    for (start, stop), own in zip(pairwise(layout.offsets()), positions):
        single = TokenLayout(1, case.grid, 2, positions=own.unsqueeze(0))
        alone.append(by_reference(qkv[start:stop], single, irpe, case.window, case.salient))
    got, wanted = tiled_routed_attention(*qkv.unbind(1), layout, irpe, case.window, case.salient), torch.cat(alone)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients(got, weight, qkv, irpe), gradients(wanted, weight, qkv, irpe)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("long_steps")
@pytest.mark.parametrize("packed", [False, True])
def test_the_module_takes_it(packed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SparseAttention(HEADS * WIDTH, HEADS, rpe={"on": "qk"}, sparsity="routed", num_salient=6, window=2)
    for table in module.irpe.parameters() if module.irpe is not None else ():
        torch.nn.init.normal_(table, std=0.5)
    positions = torch.cat([torch.arange(20), torch.arange(54)]).to(device)
    x = torch.randn(*((76,) if packed else (2, 55)), HEADS * WIDTH, device=device, requires_grad=True)
    monkeypatch.setattr(sparse_attention, "tiles_pay", lambda *asked: True)
    results = []
    for own in (True, False):
        monkeypatch.setattr(sparse_attention, "tiled_pays", lambda *asked, own=own: own)
        layout = TokenLayout(2, (9, 6), 1)
        if packed:
            layout = TokenLayout(2, (9, 6), 1, positions=positions, counts=[20, 54])
        out = module.to(device)(x, layout)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("long_steps")
def test_reads_nothing_beside_its_rows(device: torch.device) -> None:
    """Numbers between the rows, before the first and after the last, and of patches that take no part, are NaN."""
    case = Case((9, 6), 1, 2, 6, {"mode": "bias", "on": "qk"}, masked=True)
    memory = torch.full((2 * 55 + 2, 5, HEADS, WIDTH), float("nan"), device=device)
    valid = torch.rand(2, 54, device=device) > 0.4
    real = torch.cat([valid.new_ones(2, 1), valid], dim=1).flatten()
    memory[1:-1, 1:4][real] = torch.randn(int(real.sum()), 3, HEADS, WIDTH, device=device)
    qkv = memory[1:-1, 1:4].requires_grad_()
    assert not qkv.is_contiguous()
    got = tiled_routed_attention(*qkv.unbind(1), case.layout(valid), case.encoding(device), case.window, case.salient)
    (gradient,) = torch.autograd.grad(got.square().sum(), qkv)
    assert got.isfinite().all()
    assert gradient.isfinite().all()
    assert not got[~real].any()
    assert not gradient[~real].any()


@pytest.mark.usefixtures("long_steps")
def test_takes_queries_keys_and_values_that_lie_apart(device: torch.device) -> None:
    case = Case((9, 6), 1, 2, 6, {"on": "qk"})
    irpe = case.encoding(device)
    qkv = torch.randn(110, 3, HEADS, WIDTH, device=device)
    query, key, value = qkv.unbind(1)
    wanted = tiled_routed_attention(query, key, value, case.layout(), irpe, 2, 6)
    apart = (query.contiguous(), key.transpose(1, 2).contiguous().transpose(1, 2), value)
    torch.testing.assert_close(tiled_routed_attention(*apart, case.layout(), irpe, 2, 6), wanted)


class Named(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("long_steps")
@pytest.mark.parametrize("form", ["full", "masked", "packed"])
def test_nothing_waits_for_the_device(form: str, device: torch.device) -> None:
    """No value is read, nothing is counted, no boolean index: plan, forward and backward."""
    case = Case((9, 6), 1, 2, 6, {"on": "qk"})
    qkv = torch.randn(110, 3, HEADS, WIDTH, device=device, requires_grad=True)
    valid = torch.rand(2, 54, device=device) > 0.4 if form == "masked" else None
    layout = case.layout(valid)
    if form == "packed":
        layout = TokenLayout(2, (20, 6), 1, positions=torch.arange(108, device=device), counts=[8, 100])
    irpe = case.encoding(device)
    with Named() as ran:
        tiled_routed_attention(*qkv.unbind(1), layout, irpe, 2, 6).sum().backward()
    waits = ("_local_scalar_dense", "item", "nonzero", "unique", "bincount", "masked_select", "index.Tensor")
    assert not [name for name in ran.names if any(wait in name for wait in waits)]


@pytest.mark.usefixtures("long_steps")
def test_is_an_operator_that_compilers_leave_alone(device: torch.device) -> None:
    case = Case((9, 6), 1, 2, 6, {"on": "k"})
    irpe, layout = case.encoding(device), case.layout()
    qkv = torch.randn(110, 3, HEADS, WIDTH, device=device, requires_grad=True)
    plan = make_plan(layout, 2, qkv.device)
    assert irpe is not None
    products = tiled.products(*qkv[:, :2].unbind(1), irpe.tables())
    extra = tiled.extra_rows(*qkv[:, :2].unbind(1), layout, plan, 6)
    given = (*(part.detach().requires_grad_() for part in qkv.unbind(1)), *products, extra)
    tables = (plan.canvas, plan.sequence_rows, plan.place, irpe.bucket_of_offset.int())
    numbers = (2, 1, irpe.class_bucket, irpe.register_bucket, False)
    torch.library.opcheck(torch.ops.cytossl.routed_tiles.default, (*given, *tables, *numbers))

    def step(qkv: Tensor) -> Tensor:
        return tiled_routed_attention(*qkv.unbind(1), case.layout(), irpe, 2, 6)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(qkv), step(qkv))


def test_a_missing_bucket_is_told() -> None:
    irpe = IRPE(RPEConfig(), WIDTH, HEADS, has_class_token=True, has_registers=False)
    rows = torch.zeros(2 + 54, HEADS, WIDTH)
    with pytest.raises(ValueError, match="2 prefix tokens need a bucket"):
        tiled_routed_attention(rows, rows, rows, TokenLayout(1, (9, 6), 2), irpe, 2, 6)


@pytest.mark.usefixtures("long_steps")
@pytest.mark.parametrize("encoding", [(), ("cross", "contextual", "qk", 1.9, False), ("product", "bias", "k")])
def test_a_trial_passes_in_16_bits(encoding: tuple[object, ...], device: torch.device) -> None:
    assert tiled._tried.__wrapped__(device, torch.float16, HEADS, WIDTH, 3, *encoding)


def test_a_trial_tells_of_wrong_results(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(tiled, "tiled_routed_attention", lambda *given: 1.1 * routed_attention(*given))
    assert not tiled._tried.__wrapped__(torch.device("cpu"), torch.float32, HEADS, WIDTH, 3, "product")
    (record,) = caplog.records
    assert "off by 10 %" in record.message


def test_is_taken_only_where_it_is_asked_for_and_can_do_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.zeros(3, HEADS, WIDTH, dtype=torch.bfloat16)
    assert not tiled_pays(query, None, 3, 0.0)
    monkeypatch.setattr(tiled, "triton_asked", lambda tensor: True)
    monkeypatch.setattr(tiled, "_right", lambda *asked: True)
    assert tiled_pays(query, None, 3, 0.0)
    assert tiled_pays(query, IRPE(RPEConfig(on="qk"), WIDTH, HEADS), 3, 0.0)
    assert not tiled_pays(query, IRPE(RPEConfig(on="kv"), WIDTH, HEADS), 3, 0.0)
    assert not tiled_pays(query, None, 3, 0.1)
    assert not tiled_pays(query.float(), None, 3, 0.0)
    assert not tiled_pays(query[..., :8], None, 3, 0.0)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert tiled_pays(query, None, 3, 0.0)
    assert not tiled_pays(query, IRPE(RPEConfig(), WIDTH, HEADS), 3, 0.0)


def test_importing_attention_imports_no_kernel_and_no_compiler() -> None:
    code = (
        "import sys, cytossl_monai.networks.blocks.sparse_attention;"
        "print([name for name in sys.modules if name.endswith(('_kernels', 'tiled_backward', 'torch._dynamo'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert out.stdout.strip() == "[]"


@pytest.mark.slow
def test_compilers_take_the_kernels(tmp_path: Path) -> None:
    """Ahead of time, bf16, heads of 64: registers hold everything on an H100, nearly so on an A100."""
    rows = compiled_ahead("tiled", tmp_path)
    assert {row["kernel"] for row in rows} == {*tiled_ops.LAUNCHES, "add_parts", "class_scores"}
    for row in rows:
        assert row["stack"] <= (0 if row["architecture"] == "sm_90" else 128), row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rpe", [None, {"mode": "bias"}, {"mode": "contextual", "on": "qk"}])
def test_on_cuda(rpe: object, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 under autocast, by the module, against the tiles, which are held to the reference."""
    pytest.importorskip("triton", reason=WANTED)
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setenv("CYTOSSL_FLEX_ATTENTION", "0")
    module = SparseAttention(128, 2, rpe=rpe, sparsity="routed", window=3, num_salient=16).cuda()  # type: ignore[arg-type]
    for table in module.irpe.parameters() if module.irpe is not None else ():
        torch.nn.init.normal_(table, std=0.2)
    counts, side, batch = [900, 17, 1500] if packed else None, 48, 3 if packed else 2
    positions = None
    if counts is not None:
        positions = torch.cat([torch.randperm(side * side)[:n].sort().values for n in counts]).cuda()
    rows = sum(counts) + 3 if counts is not None else 2 * (side * side + 1)
    x = torch.randn(rows, 128, device="cuda")
    x = (x if packed else x.view(2, -1, 128)).requires_grad_()
    outputs, grads = [], []
    for switch in ("1", "0"):
        monkeypatch.setenv("CYTOSSL_TRITON_ATTENTION", switch)
        query = torch.zeros(1, 2, 64, device="cuda", dtype=torch.bfloat16)
        assert tiled_pays(query, module.irpe, 3, 0.0) is (switch == "1")
        layout = TokenLayout(batch, (side, side), 1, positions=positions, counts=counts)
        with torch.autocast("cuda", torch.bfloat16):
            out = module(x, layout)
        outputs.append(out.float())
        grads.append(torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()]))
    scale = 0.03
    assert (outputs[0] - outputs[1]).abs().mean() < scale * outputs[1].abs().mean()
    for a, b in zip(*grads):
        assert (a - b).abs().mean() <= 3 * scale * b.abs().mean() + 1e-7
