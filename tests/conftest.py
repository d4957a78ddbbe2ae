"""Fixtures that every test module shares."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

REPO_ROOT = Path(__file__).resolve().parents[1]


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


@pytest.fixture
def repo_root() -> Path:
    """Root of the checkout."""
    return REPO_ROOT
