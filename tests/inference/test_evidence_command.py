"""The benchmark of evidence: what it learns with --supervised, and from whom."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch

from cytossl_monai.data.bags.features import read_features, write_features
from cytossl_monai.inference import SlideClassifier
from cytossl_monai.metrics import linear_probe
from cytossl_monai.networks import MILClassifier, save_classifier
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.utils.files import write_json

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence_command", ROOT / "scripts/bench/evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_field_belongs_to_the_lesion_it_is_centred_in_or_to_the_nearest_cell(command: ModuleType) -> None:
    rng = np.random.default_rng(0)
    truth = pd.DataFrame(rng.integers(0, 200, (40, 2)), columns=["x", "y"]).assign(
        w=rng.integers(20, 60, 40), h=rng.integers(20, 60, 40), file=[f"{i}.jpg" for i in range(40)]
    )
    truth["class"] = rng.choice(["hsil", "flora"], 40)
    fields = pd.DataFrame(rng.integers(-20, 220, (80, 2)), columns=["x", "y"]).assign(size=10)
    wanted = []
    for field in fields.itertuples():
        x, y = field.x + 5, field.y + 5
        inside = [c for _, c in truth.iterrows() if c.x <= x < c.x + c.w and c.y <= y < c.y + c.h]
        inside.sort(key=lambda c: (c["class"] != "hsil", (x - c.x - c.w / 2) ** 2 + (y - c.y - c.h / 2) ** 2))
        wanted.append(f"{inside[0]['class']}/{inside[0].file}" if inside else "")
    assert command.crops_of(fields, truth) == wanted
    assert 0 < wanted.count("") < len(wanted)
    assert [name.startswith("hsil") for name in wanted] == command.lesion_fields(fields, truth).tolist()
    assert set(command.crops_of(fields, truth[:0])) == {""}  # a slide without cells
    assert not command.lesion_fields(fields, truth[:0]).any()


def test_cells_are_judged_by_every_repeat_that_kept_their_slide_out(command: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    attrs = {"instances": "nuclei", "encoder": "e", "patch_size_level0": 10}
    for slide in ("a", "b"):
        features = rng.normal(size=(6, 4)).astype(np.float32)
        write_features(tmp_path / f"{slide}.h5", features, rng.integers(0, 90, (6, 2)), attrs)
    held_out = {"fold_0": ["a"], "fold_1": ["b"], "repeat_1/fold_0": ["b"], "repeat_1/fold_1": ["a"]}
    for number, (fold, slides) in enumerate(held_out.items()):
        torch.manual_seed(number)
        classifier = MILClassifier(ABMIL(4, 2), ["negative", "positive"], encoder={"hash": "e", "dim": 4})
        save_classifier(tmp_path / fold / "model.pt", classifier)
        write_json(tmp_path / fold / "fold.json", {"slides": slides})
    command.out_of_fold(tmp_path, tmp_path, tmp_path, tmp_path / "out")
    for slide, folds in {"a": ["fold_0", "repeat_1/fold_1"], "b": ["fold_1", "repeat_1/fold_0"]}.items():
        bag = read_features(tmp_path / f"{slide}.h5")
        judges = [SlideClassifier(tmp_path / fold / "model.pt") for fold in folds]
        each = [judge.predict(bag.features, bag.encoder, slide) for judge in judges]
        table = pd.read_parquet(tmp_path / "out" / slide / "tiles.parquet")
        assert np.ptp([judged.attention for judged in each], axis=0).max() > 1e-3
        np.testing.assert_allclose(table["attention"], np.mean([judged.attention for judged in each], axis=0))
        np.testing.assert_allclose(table["score"], np.mean([judged.score for judged in each], axis=0))


def test_crops_known_by_heart_are_worth_nothing_once_they_are_held_out(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features that name the crop and nothing else: the same twelve crops lie on every slide."""
    (tmp_path / "truth").mkdir()
    rows = ["slide_id,path,label,patient_id"]
    for number in range(10):
        kinds = ["hsil"] * 6 + ["flora"] * 6 if number % 2 else ["flora"] * 6
        files = [f"{i}.jpg" for i in range(12 - len(kinds), 12)]
        places = np.arange(len(kinds)) * 100
        truth = pd.DataFrame({"x": places, "y": 0, "w": 50, "h": 50, "class": kinds, "file": files})
        truth.to_csv(tmp_path / "truth" / f"s{number}.csv", index=False)
        features = np.eye(12, dtype=np.float32)[12 - len(kinds) :]
        coords = np.stack([places + 5, np.full(len(kinds), 5)], 1)
        write_features(
            tmp_path / f"s{number}.h5", features, coords, {"instances": "nuclei", "patch_size_level0": 40, "mpp": 0.25}
        )
        rows.append(f"s{number},s{number}.tif,{number % 2},p{number}")
    (tmp_path / "slides.csv").write_text("\n".join(rows) + "\n")
    words = ["x", "--slides", str(tmp_path / "slides.csv"), "--supervised", "--top", "3"]
    monkeypatch.setattr(command, "RESAMPLES", 30)
    monkeypatch.setattr(command, "linear_probe", partial(linear_probe, penalties=(1.0,)))  # choosing one takes long
    monkeypatch.setattr(sys, "argv", [*words, "--index", str(tmp_path), "--features", str(tmp_path)])
    command.main()
    lines = capsys.readouterr().out.splitlines()
    known, held = (
        float(line.split("other slides, other crops" if i else "other slides")[1].split()[0])
        for i, line in enumerate(lines[-2:])
    )
    assert lines[0] == "10 slides, 5 positive; 30 of 90 instances are lesions"
    assert known == 1.0
    assert held < 0.7
