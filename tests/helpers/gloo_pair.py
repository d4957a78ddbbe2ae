"""Runs a function in two processes joined by gloo, and hands back what each returned."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _work(rank: int, port: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.save(function(rank), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_pair(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """Results of ``function(0)`` and ``function(1)``, run side by side; ``function`` must be importable."""
    mp.spawn(_work, args=(_free_port(), function, str(folder)), nprocs=2, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
