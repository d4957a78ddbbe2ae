"""The small encoders as fixtures."""

from __future__ import annotations

import pytest
from tiny_encoders import TinyConv, TinyViT


@pytest.fixture
def tiny_vit() -> TinyViT:
    return TinyViT()


@pytest.fixture
def tiny_conv() -> TinyConv:
    return TinyConv()
