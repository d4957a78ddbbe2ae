"""Fixtures that every test module shares."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

REPO_ROOT = Path(__file__).resolve().parents[1]

if not torch.cuda.is_available():  # Triton decides when it is first imported, by whatever test that is
    os.environ.setdefault("TRITON_INTERPRET", "1")


def real_data_root() -> Path | None:
    """Folder of the real images: ``CYTOSSL_DATA``, or ``../shared/data`` beside the checkout; None where absent."""
    named = os.environ.get("CYTOSSL_DATA")
    candidates = [Path(named)] if named else [REPO_ROOT.parent / "shared" / "data"]
    return next((path for path in candidates if path.is_dir()), None)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The real images; the test is skipped where they are absent."""
    root = real_data_root()
    if root is None:
        pytest.skip("real images absent: set CYTOSSL_DATA to their folder")
    return root


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may use the global state


@pytest.fixture(autouse=True)
def _log_stays() -> Iterator[None]:
    """A bundle that runs in this process gives the root logger handlers; the next test starts without them."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _signals_stay() -> Iterator[None]:
    """No run leaves its answer to a signal behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before, "a signal handler was left behind"


@pytest.fixture
def repo_root() -> Path:
    """Root of the checkout."""
    return REPO_ROOT
