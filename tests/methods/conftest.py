"""Lets the tests of the methods use the two-process helper of the losses, and small encoders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "losses"))

from tiny_encoders import TinyConv, TinyViT


@pytest.fixture
def tiny_vit() -> TinyViT:
    return TinyViT()


@pytest.fixture
def tiny_conv() -> TinyConv:
    return TinyConv()
