"""What the parts share: device and sizes, the clock, a figure as a line."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The parser of a part."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    return parser


def device_of(dry: bool) -> torch.device:
    """The CPU for a dry run, else the first GPU."""
    return torch.device("cpu" if dry else "cuda")


def figure(name: str, value: Any) -> None:
    """Hand a figure to run.py."""
    value = float(f"{value:.4g}") if isinstance(value, float) else value
    print(json.dumps({"figure": name, "value": value}), flush=True)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int = 10, warmup: int = 3) -> float:
    """Median seconds of a piece of work, the device's queue emptied before and after."""
    times = []
    for turn in range(warmup + repeats):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        if turn >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16, as training on a GPU runs."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def cells(batch: int, size: int, seed: int = 0) -> Tensor:
    """(B, 3, size, size) uint8 tiles with nuclei: cut from a made-up field."""
    import numpy as np

    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    tiles = np.full((batch, size, size, 3), 236, np.float32) + rng.normal(0, 3, (batch, size, size, 3))
    for tile in tiles:
        for _ in range(4):
            y, x, radius = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(7, 11)
            far = np.hypot(rows - y, columns - x)
            tile[far < 3.5 * radius] -= (18, 34, 12)
            tile[far < radius] -= (90, 96, 50)
    return torch.from_numpy(tiles.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
