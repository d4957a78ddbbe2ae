"""Joining the group of processes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from cytossl_monai.utils.distributed import init_distributed


def test_processes_wait_for_one_that_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's ten minutes for NCCL are less than a linear probe of many images takes; the others ended the run."""
    given: dict[str, Any] = {}
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options, backend=backend))
    init_distributed("gloo")
    assert given["backend"] == "gloo"
    assert given["timeout"] >= timedelta(hours=1)
