"""Triton kernels without a GPU: interpreted on CPU tensors, and compiled ahead for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WANTED = "needs Triton: pip install -r requirements-triton.txt"
# Bytes of shared memory that a block may have (A100, H100).
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


def device_of_kernels() -> torch.device:
    """Where kernels run: a GPU, or the CPU by Triton's interpreter (`conftest` turns it on). Skips without Triton."""
    triton = pytest.importorskip("triton", reason=WANTED)
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert triton.knobs.runtime.interpret
    return torch.device("cpu")


def compiled_ahead(attention: str, cache: Path) -> list[dict[str, Any]]:
    """What compilers say of the kernels of ``fused`` or ``tiled`` attention, see `triton_ahead`. Skips without Triton.

    Args:
        attention: which.
        cache: a new folder, so that nothing compiled before is taken.
    """
    pytest.importorskip("triton", reason=WANTED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(Path(__file__).with_name("triton_ahead.py")), attention, "64", *SHARED]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=570, check=False)
    assert told.returncode == 0, told.stderr
    rows: list[dict[str, Any]] = json.loads(told.stdout.splitlines()[-1])
    for row in rows:
        assert row["shared"] <= SHARED[row["architecture"]], row
    return rows
