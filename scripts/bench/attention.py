"""Time and memory of sparse relative attention against dense attention, forward and backward, in one run.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python scripts/bench/attention.py [--device cuda] [--output figures.json]

Every case is one self-attention module (projections included) on the same tokens, forward and backward. Cases take
turns, and the shortest of their times counts: what else runs on the machine only adds to it. Beside the time on the
clock stands the processor's time, of all threads, which other programs disturb less. Peak memory is measured in a
process of its own: resident memory above what it held before the step (CPU), or the allocator's peak (CUDA).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks.selfattention import SABlock
from torch import Tensor, nn

from cytossl_monai.networks import SRTransformer
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention
from cytossl_monai.networks.blocks.token_layout import TokenLayout

WIDTH, HEADS = 384, 6
RPE = {"method": "product", "mode": "contextual", "on": "k"}


class DenseSDPA(nn.Module):
    """Baseline 1: PyTorch's own dense attention without relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MaterialisedBias(nn.Module):
    """Baseline 2: dense attention with contextual iRPE looked up for all pairs (h, N, N), plain PyTorch."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.inner = SparseAttention(WIDTH, HEADS, qkv_bias=True, rpe=RPE)
        layout = TokenLayout(1, (side, side), 1)
        assert self.inner.irpe is not None
        ids = self.inner.irpe.pair_buckets(*layout.rows_and_cols(torch.device("cpu")), 1)
        self.register_buffer("ids", ids)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        inner = self.inner
        q, k, v = inner.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        q = q * q.shape[-1] ** -0.5
        table = inner.irpe.tables().key  # type: ignore[union-attr]
        bias = (q @ table.transpose(-2, -1)).gather(-1, self.ids.expand(*q.shape[:3], -1))
        weights = (q @ k.transpose(-2, -1) + bias).softmax(dim=-1)
        return inner.out_proj((weights @ v).transpose(1, 2).flatten(2))


class Ours(nn.Module):
    """`SparseAttention` on a full square grid."""

    def __init__(self, side: int, sparsity: str, rpe: Any = RPE) -> None:
        super().__init__()
        self.side = side
        self.inner = SparseAttention(
            WIDTH, HEADS, qkv_bias=True, rpe=rpe, sparsity=sparsity, keep_ratio=0.5, num_salient=32, window=3
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return self.inner(x, TokenLayout(x.shape[0], (self.side, self.side), 1))


class Published(Ours):
    """The paper's attention: of each row the 16 largest scores, the class token's too; iRPE on q, k and v."""

    def __init__(self, side: int) -> None:
        super().__init__(side, "topk", {**RPE, "on": "qkv"})
        self.inner.num_keys, self.inner.sparse_prefix = 16, True


CASES: dict[str, Callable[[int], nn.Module]] = {
    "dense SDPA, no iRPE": lambda side: DenseSDPA(),
    "dense, materialised iRPE": MaterialisedBias,
    "MONAI SABlock": lambda side: SABlock(WIDTH, HEADS, qkv_bias=True),
    "ours: none + iRPE": lambda side: Ours(side, "none"),
    "ours: topk 0.5 + iRPE": lambda side: Ours(side, "topk"),
    "ours: topk 16 + iRPE qkv (published)": lambda side: Published(side),
    "ours: routed + iRPE": lambda side: Ours(side, "routed"),
    "ours: routed, no iRPE": lambda side: Ours(side, "routed", None),
}


BASE = "dense, materialised iRPE"


def _step(module: nn.Module, x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    module(x).square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()


def _prepare(name: str, tokens: int, batch: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    side = round(tokens**0.5)
    module = CASES[name](side).to(device, dtype)
    return module, torch.randn(batch, tokens + 1, WIDTH, device=device, dtype=dtype, requires_grad=True)


def _resident(field: str) -> float:
    """Resident memory of this process, MiB (Linux): ``VmRSS`` now, ``VmHWM`` its highest."""
    with open("/proc/self/status", encoding="ascii") as stream:
        line = next(line for line in stream if line.startswith(field))
    return int(line.split()[1]) / 1024


def _peak(name: str, tokens: int, batch: int, device: str, dtype: torch.dtype, result: Any) -> None:
    """Peak memory of one step, MiB."""
    module, x = _prepare(name, tokens, batch, device, dtype)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
        stream.write("5")  # forget the peak of the preparation
    before = _resident("VmRSS")
    _step(module, x)
    result.value = _resident("VmHWM") - before


def peak_memory(name: str, tokens: int, batch: int, device: str, dtype: torch.dtype) -> float:
    """Peak memory of one step above what was held before, in MiB.

    CUDA counts it itself. On a CPU it is measured in a process forked for it, which is cheap; call it before this
    process has computed anything.
    """
    if device == "cuda":
        module, x = _prepare(name, tokens, batch, device, dtype)
        _step(module, x)  # compiled kernels and library handles are not the step's
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(module, x)
        return float((torch.cuda.max_memory_allocated() - before) / 2**20)
    context = multiprocessing.get_context("fork")
    result = context.Value("d", 0.0)
    process = context.Process(target=_peak, args=(name, tokens, batch, device, dtype, result))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"measuring the memory of {name!r} ended with {process.exitcode}")
    return float(result.value)


def interleaved(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, tuple[float, float]]:
    """Shortest seconds of each step, on the clock and of the processor, taken in turns."""
    best = {name: (float("inf"), float("inf")) for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            taken = time.perf_counter() - wall, time.process_time() - cpu
            best[name] = (min(best[name][0], taken[0]), min(best[name][1], taken[1]))
    return best


def bench_attention(
    tokens: int, batch: int, repeats: int, device: str, dtype: torch.dtype, memory: dict[str, float]
) -> list[dict[str, Any]]:
    """All cases at one number of tokens."""
    steps = {}
    for name in CASES:
        module, x = _prepare(name, tokens, batch, device, dtype)
        steps[name] = lambda module=module, x=x: _step(module, x)
    seconds = interleaved(steps, repeats)
    base = seconds[BASE]
    rows = []
    for name, (wall, cpu) in seconds.items():
        row = {"case": name, "tokens": tokens, "batch": batch, "ms": 1e3 * wall, "cpu_ms": 1e3 * cpu}
        row["speedup"], row["cpu_speedup"] = base[0] / wall, base[1] / cpu
        if name in memory:
            row["peak_mib"], row["memory_share"] = memory[name], memory[name] / memory[BASE]
        rows.append(row)
        share = f"  {row['peak_mib']:6.0f} MiB {row['memory_share']:5.2f}" if name in memory else ""
        print(
            f"{tokens:5d} {name:26s} {row['ms']:8.0f} ms x{row['speedup']:5.2f}   "
            f"processor {row['cpu_ms']:8.0f} ms x{row['cpu_speedup']:5.2f}{share}",
            flush=True,
        )
    return rows


def bench_background(repeats: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The whole encoder with and without `drop_background`, 70 % of the patches blank in each image on average."""
    torch.manual_seed(0)
    network = SRTransformer(
        3, 224, 16, WIDTH, 4 * WIDTH, 12, HEADS, qkv_bias=True, rpe=RPE, sparsity="routed", class_token=True
    ).to(device, dtype)
    images = torch.rand(8, 3, 224, 224, device=device, dtype=dtype)
    foreground = torch.rand(8, 196, device=device) > 0.7

    def step(mask: Tensor | None) -> None:
        network.zero_grad(set_to_none=True)
        network.forward_features(images, foreground=mask).cls.square().mean().backward()
        if images.is_cuda:
            torch.cuda.synchronize()

    steps = {"all patches": lambda: step(None), "background dropped": lambda: step(foreground)}
    seconds = interleaved(steps, repeats)
    whole, less = seconds.values()
    blank = 1 - foreground.float().mean().item()
    print(
        f"encoder of 12 layers, {100 * blank:.0f} % blank: x{whole[0] / less[0]:.2f} on the clock, "
        f"x{whole[1] / less[1]:.2f} of the processor",
        flush=True,
    )
    return [
        {"case": f"encoder: {name}", "tokens": 196, "batch": 8, "ms": 1e3 * wall, "cpu_ms": 1e3 * cpu}
        for name, (wall, cpu) in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[196, 1024, 4096], help="square numbers; none: the encoder only"
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help=f"beside {BASE!r}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--total-tokens", type=int, default=4096, help="batch = this / tokens (at least 1)")
    parser.add_argument("--skip-background", action="store_true")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    dtype = getattr(torch, args.dtype)
    for name in set(CASES) - {BASE, *args.cases}:
        del CASES[name]
    rows: list[dict[str, Any]] = []
    largest = max(args.tokens, default=0)
    memory = {}
    for name in CASES if largest else ():  # before anything else is computed in this process, see peak_memory
        memory[name] = peak_memory(name, largest, max(1, args.total_tokens // largest), args.device, dtype)
    for tokens in args.tokens:
        of_these = memory if tokens == largest else {}
        batch = max(1, args.total_tokens // tokens)
        rows += bench_attention(tokens, batch, args.repeats, args.device, dtype, of_these)
    by = {(row["case"], row["tokens"]): row for row in rows}
    for case in CASES:
        if (case, 1024) in by and (case, 4096) in by:
            small, large = by[case, 1024], by[case, 4096]
            clock, cpu = (large[key] / large["batch"] * small["batch"] / small[key] for key in ("ms", "cpu_ms"))
            print(f"growth per image from 1024 to 4096 tokens, {case}: x{clock:.1f}, processor x{cpu:.1f}")
    if not args.skip_background:
        rows += bench_background(args.repeats, args.device, dtype)
    if args.output:
        machine = {"processor": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        with open(args.output, "w", encoding="utf-8") as stream:
            json.dump({"machine": machine, "device": args.device, "dtype": args.dtype, "rows": rows}, stream, indent=2)


if __name__ == "__main__":
    main()
