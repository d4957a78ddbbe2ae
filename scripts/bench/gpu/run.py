"""Run the parts of the GPU benchmark one after the other, each in a process of its own with a time limit.

    scripts/bench/gpu.sh [--only PART ...] [--dry] [--output DIR]

A part is a script beside this one that prints figures as one JSON object a line, ``{"figure": ..., "value": ...}``;
what else it prints is shown as it comes. ``gpu.json`` is written anew after each part, so that nothing is lost, and
``gpu.md`` at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    """One part: what it shows, and the most seconds that it may take."""

    name: str
    title: str
    seconds: int


PARTS = [
    Part("tests", "tests that need a GPU", 90),
    Part("attention", "attention, forward and backward", 60),
    Part("kernels", "attention in kernels of our own", 60),
    Part("views", "views and NCP as a part of a step", 45),
    Part("steps", "training steps of each method", 75),
    Part("reading", "slides decoded on the device", 35),
    Part("nuclei", "nuclei on the device against the CPU", 35),
    Part("embedding", "embedding against the bare forward pass", 45),
    Part("recovery", "fp16, SIGTERM, resume", 45),
    Part("pretraining", "pretraining by gpu.yaml with online kNN", 45),
]
"""In all at most 535 seconds. `pretraining --seconds 300` is the longer run, by itself."""


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def run_part(part: Part, arguments: list[str], seconds: int) -> dict[str, Any]:
    """Run one part; returns its figures, or what went wrong."""
    command = [sys.executable, "-W", "ignore", str(HERE / f"{part.name}.py"), *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    figures: dict[str, Any] = {}
    tail: list[str] = []
    killer = threading.Timer(seconds, lambda: os.killpg(process.pid, signal.SIGKILL))
    killer.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"figure"'):
            row = json.loads(line)
            figures[row["figure"]] = row["value"]
            print(f"   {row['figure']}: {row['value']}", flush=True)
        else:
            tail = [*tail[-15:], line.rstrip()]
            print("   " + line.rstrip(), flush=True)
    status = process.wait()
    took = time.perf_counter() - start
    killer.cancel()
    outcome = "passed" if status == 0 else "out of time" if took >= seconds else "failed"
    result = {"outcome": outcome, "seconds": round(took, 1), "figures": figures}
    return result if status == 0 else {**result, "status": status, "tail": tail}


def markdown(content: dict[str, Any]) -> str:
    """The figures as a page."""
    about = content["machine"]
    device = about["gpu"] or f"no GPU: a dry run on {about['cores']} CPU cores, whose figures mean nothing"
    lines = [f"Measured on: {device}; PyTorch {about['torch']}, CUDA {about['cuda']}, Python {about['python']}.", ""]
    lines += ["| part | outcome | seconds | figure | value |", "|---|---|---|---|---|"]
    for part in PARTS:
        result = content["parts"].get(part.name)
        if result is None:
            continue
        head = f"| {part.title} | {result['outcome']} | {result['seconds']} |"
        rows = list(result["figures"].items()) or [("", "")]
        for number, (name, value) in enumerate(rows):
            lines.append(f"{head if number == 0 else '| | | |'} {name} | {value} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: the same code, no figures")
    parser.add_argument("--output", type=Path, default=Path("gpu"))
    args = parser.parse_args()
    import torch

    if not args.dry and not torch.cuda.is_available():
        print(
            "gpu.sh: this PyTorch sees no CUDA device; install a CUDA build, or try the code with --dry",
            file=sys.stderr,
        )
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"machine": machine(), "dry": args.dry, "parts": {}}
    print(json.dumps(content["machine"]), flush=True)
    begin = time.perf_counter()
    for part in PARTS:
        if args.only and part.name not in args.only:
            continue
        print(f"== {part.title} ({time.perf_counter() - begin:.0f} s)", flush=True)
        limit = 600 if args.dry else part.seconds
        content["parts"][part.name] = run_part(part, ["--dry"] if args.dry else [], limit)
        (args.output / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")
    (args.output / "gpu.md").write_text(markdown(content))
    failed = [name for name, result in content["parts"].items() if result["outcome"] != "passed"]
    passed = len(content["parts"]) - len(failed)
    print(f"== {passed} parts passed, {len(failed)} failed {failed or ''}; see {args.output}/gpu.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
