"""Attention at 196, 1,024 and 4,096 tokens, bf16, forward and backward: every path against dense SDPA and MONAI's.

The goal: routed attention with iRPE at 4,096 tokens is faster than dense SDPA without it. Times and memory come from
``scripts/bench/attention.py``; on a CPU, a dry run also compiles FlexAttention's forward pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import arguments, figure

BENCH = Path(__file__).resolve().parents[1] / "attention.py"


def main() -> int:
    args = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "attention.json"
        sizes = ["--tokens", "64"] if args.dry else ["--tokens", "196", "1024", "4096"]
        more = ["--total-tokens", "64", "--repeats", "1"] if args.dry else ["--total-tokens", "32768", "--repeats", "5"]
        on = ["--device", "cpu"] if args.dry else ["--device", "cuda", "--dtype", "bfloat16"]
        command = [sys.executable, str(BENCH), *sizes, *more, *on, "--skip-background", "--output", str(output)]
        status = subprocess.run(command, check=False).returncode
        rows = json.loads(output.read_text())["rows"] if output.is_file() else []
    times = {(row["case"], row["tokens"]): row["ms"] for row in rows}
    for (case, tokens), milliseconds in times.items():
        figure(f"{case}, {tokens} tokens, ms", milliseconds)
    routed = [ms for (case, tokens), ms in times.items() if tokens == 4096 and case.endswith("routed + iRPE")]
    dense = [ms for (case, tokens), ms in times.items() if tokens == 4096 and case.startswith("dense SDPA")]
    if routed and dense:
        figure("goal, routed with iRPE / dense SDPA at 4,096 (below 1)", min(routed) / min(dense))
    return status


if __name__ == "__main__":
    sys.exit(main())
