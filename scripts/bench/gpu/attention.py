"""Attention at 196, 1,024 and 4,096 tokens, bf16, forward and backward: every path against dense SDPA and MONAI's.

The goal: routed attention with iRPE at 4,096 tokens is faster than dense SDPA without it. Cases, clock and memory are
those of ``scripts/bench/attention.py``; figures come size by size, the largest first. On a CPU, a dry run also compiles
FlexAttention's forward pass.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from common import arguments, figure

BENCH = Path(__file__).resolve().parents[1] / "attention.py"


def bench() -> Any:
    """The module of the benchmark, which is no package."""
    spec = importlib.util.spec_from_file_location("attention_bench", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    args = arguments(__doc__).parse_args()
    module = bench()
    device, dtype = ("cpu", torch.float32) if args.dry else ("cuda", torch.bfloat16)
    sizes, total, repeats = ([64], 64, 1) if args.dry else ([4096, 196, 1024], 32768, 5)
    for tokens in sizes:
        batch = max(1, total // tokens)
        # On a CPU memory is measured in forked processes, before anything is computed here.
        memory = {name: module.peak_memory(name, tokens, batch, device, dtype) for name in module.CASES}
        rows = module.bench_attention(tokens, batch, repeats, device, dtype, memory)
        times = {row["case"]: row["ms"] for row in rows}
        for row in rows:
            figure(f"{row['case']}, {tokens} tokens, ms for {batch} images", row["ms"])
            figure(f"{row['case']}, {tokens} tokens, MiB", row["peak_mib"])
        if tokens == 4096:
            ratio = times["ours: routed + iRPE"] / times["dense SDPA, no iRPE"]
            figure("goal, routed with iRPE / dense SDPA at 4,096 (below 1)", ratio)
    return 0


if __name__ == "__main__":
    sys.exit(main())
