"""The paper's study: arms and seeds, resumed, and a table that says what it knows."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from scipy import stats
from sklearn.metrics import roc_auc_score

from cytossl_monai.data.bags.features import read_features, write_features
from cytossl_monai.data.synthetic.slides import make_slides
from cytossl_monai.engines.mil.cross_validate import CrossValidation
from cytossl_monai.engines.study import paper_slides
from cytossl_monai.engines.study.paper import PaperStudy, paper_table, read_paper_study
from cytossl_monai.engines.study.paper_slides import SlideRow, SlideStudy, paired_over_seeds_and_patients, slide_table
from cytossl_monai.engines.study.seeds import paired_over_seeds
from cytossl_monai.metrics.bootstrap import bootstrap_intervals
from cytossl_monai.utils.errors import InputError

ROOT = Path(__file__).parents[2]


def rows_of(gains: list[float]) -> list[dict]:
    rows = []
    for seed, gain in enumerate(gains):
        for arm, value in (("dino", 0.4 + 0.05 * seed), ("all", 0.4 + 0.05 * seed + gain)):
            figures = dict.fromkeys(("knn", "linear_probe", "linear_probe_auc"), value)
            rows.append({"method": arm, "arm": f"seed{seed}", "task": "cells", **figures})
    return rows


def test_gains_are_paired_over_the_seeds() -> None:
    gains = [0.02, 0.03, 0.01]
    mean, low, high, pairs = paired_over_seeds(rows_of(gains), "all", "dino", "cells", "knn")
    wanted = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert (mean, low, high, pairs) == pytest.approx((0.02, wanted.low, wanted.high, 3))
    assert math.isnan(paired_over_seeds(rows_of(gains[:1]), "all", "dino", "cells", "knn")[1])
    assert paired_over_seeds(rows_of(gains), "ncp", "dino", "cells", "knn")[3] == 0


def test_the_table_has_the_papers_figures_beside_ours() -> None:
    study = read_paper_study(ROOT / "configs/study/paper.yaml")
    table = paper_table(study, rows_of([0.02, 0.03, 0.01]))
    line = next(line for line in table.splitlines() if line.startswith("| all "))
    assert ".974 / 94.37 / 85.48" in line
    assert "+0.020" in line
    assert "not run" in next(line for line in table.splitlines() if line.startswith("| ncp "))
    single = next(line for line in paper_table(study, rows_of([0.02])).splitlines() if line.startswith("| all "))
    assert "no interval" in single


def test_arms_share_seeds_and_differ_in_their_parts_alone(tmp_path: Path) -> None:
    study = PaperStudy(read_paper_study(ROOT / "configs/study/paper.yaml"), tmp_path, tmp_path / "out", ROOT)
    runs = {run.name: run for run in study.runs()}
    assert len(runs) == 9 * 3
    dino, both = runs["dino/seed1"].settings, runs["all/seed1"].settings
    assert dino["seed"] == both["seed"] == 1
    differing = {key for key in dino.keys() | both.keys() if dino.get(key) != both.get(key)}
    assert differing == {"backbone#rpe", "backbone#sparsity", "backbone#num_keys", "backbone#sparse_prefix"}
    assert "ncp" in dino
    assert "ncp" not in both
    with pytest.raises(InputError, match="unknown nothing"):
        study.runs(["nothing"])
    with pytest.raises(InputError, match="no scale 'huge'; it has small, tiny, full"):
        read_paper_study(ROOT / "configs/study/paper.yaml", "huge")


def test_runs_and_goes_on(tmp_path: Path) -> None:
    for index in range(24):
        folder = tmp_path / "data" / "cells" / ("a" if index % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.full((96, 96, 3), 220, np.uint8)
        pixels[30:60, 30:60] = 40 + 60 * (index % 2) + index
        Image.fromarray(pixels).save(folder / f"{index}.png")
    content = copy.deepcopy(read_paper_study(ROOT / "configs/study/paper.yaml"))
    content["tasks"] = {"cells": {**content["tasks"]["cells"], "n_folds": 2}}
    content["seeds"] = [0]
    content["settings"] |= {"steps": 2, "epoch_length": 2, "batch_size": 4, "prototypes": 16, "head_hidden_dim": 16}
    content["settings"]["backbone#num_layers"] = 1
    study = PaperStudy(content, tmp_path / "data", tmp_path / "out", ROOT)
    run = study.runs(["all"])[0]
    model = study.train(run)
    rows = study.evaluate(run)
    assert [(r["method"], r["arm"], r["task"], r["steps"]) for r in rows] == [("all", "seed0", "cells", 2)]
    before = model.stat().st_mtime_ns
    assert study.train(run).stat().st_mtime_ns == before
    assert study.evaluate(run) == rows


def slide_rows(encoder: str, lift: float, seeds: tuple[int, ...] = (0, 1, 2)) -> list[SlideRow]:
    """40 slides of 20 patients, half of them positive; another order of the slides each seed."""
    rows = []
    for seed in seeds:
        rng = np.random.default_rng([7, seed])
        labels = np.arange(40) // 2 % 2
        score = 1 / (1 + np.exp(-(rng.standard_normal(40) + lift * labels)))
        order = rng.permutation(40)
        rows.append(
            SlideRow(
                encoder,
                "abmil",
                seed,
                [f"s{i}" for i in order],
                [f"p{i // 2}" for i in order],
                labels[order],
                np.stack([1 - score, score], 1)[order],
                {"auc": float(roc_auc_score(labels, score)), "accuracy": 0.5, "recall": 0.25},
            )
        )
    return rows


def test_gains_are_paired_over_seeds_and_patients() -> None:
    ours, base = slide_rows("Cyto-SSL", 2.0), slide_rows("ResNet-50", 1.0)
    interval, pairs = paired_over_seeds_and_patients(ours, base, 400)
    wanted = np.mean([a.figures["auc"] - b.figures["auc"] for a, b in zip(ours, base)])
    assert pairs == 3
    assert interval.value == pytest.approx(float(wanted))
    assert interval.low < wanted < interval.high
    # The naive bootstrap: patients of either class and seeds, with replacement, the same ones for both.
    rng, draws = np.random.default_rng(5), []
    for _ in range(150):
        patients = [*rng.choice(range(0, 20, 2), 10), *rng.choice(range(1, 20, 2), 10)]
        slides = [f"s{2 * p + k}" for p in patients for k in (0, 1)]
        gains = []
        for seed in rng.integers(0, 3, 3):
            aucs = []
            for row in (ours[seed], base[seed]):
                places = [row.slides.index(s) for s in slides]
                aucs.append(roc_auc_score(row.labels[places], row.probabilities[places, 1]))
            gains.append(aucs[0] - aucs[1])
        draws.append(np.mean(gains))
    assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.05)
    one, pairs = paired_over_seeds_and_patients(ours[:1], base, 100)
    assert pairs == 1
    assert one.value == pytest.approx(ours[0].figures["auc"] - base[0].figures["auc"])
    assert paired_over_seeds_and_patients(ours[:1], base[1:], 10)[1] == 0


def test_the_gain_is_of_all_seeds_whatever_the_bootstrap_draws_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours ranks perfectly with the first seed, and by chance like the base with the others: patients alter nothing."""
    ours, base = slide_rows("Cyto-SSL", 0.0), slide_rows("ResNet-50", 0.0)
    for row in (*ours, *base):
        perfect = row is ours[0]
        row.probabilities[:, 1] = row.labels if perfect else 0.5
        row.probabilities[:, 0] = 1 - row.probabilities[:, 1]
    drawn = bootstrap_intervals

    def other_order(statistic: Callable, n: int, *rest: object, **given: object) -> dict:
        statistic(np.zeros(n, int) + np.arange(n) % 4)  # not of all slides
        return drawn(statistic, n, *rest, **given)

    for way in (drawn, other_order):
        monkeypatch.setattr(paper_slides, "bootstrap_intervals", way)
        interval, _ = paired_over_seeds_and_patients(ours, base, 400)
        assert interval.value == pytest.approx(0.5 / 3)
        # Of three seeds drawn from three none is the first in 8 of 27 draws, and each is in 1 of 27.
        assert (interval.low, interval.high) == pytest.approx((0.0, 0.5))
    # The same with every seed alike: no draw differs.
    alike = [replace(row, probabilities=ours[0].probabilities, slides=ours[0].slides, patients=ours[0].patients,
                     labels=ours[0].labels) for row in ours]  # fmt: skip
    interval, _ = paired_over_seeds_and_patients(alike, base, 50)
    assert (interval.low, interval.value, interval.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_slide_table_says_what_it_knows() -> None:
    study = read_paper_study(ROOT / "configs/study/paper.yaml")
    table = slide_table(study, [*slide_rows("Cyto-SSL", 2.0), *slide_rows("ResNet-50", 1.0, (0,))], 50)
    line = next(line for line in table.splitlines() if line.startswith("| Cyto-SSL | abmil | .974"))
    assert "/ 50.0 / 25.0 | 3 | +" in line
    assert "one seed: of the patients alone" in line
    assert table.count("not run") == 6 * 6 - 2 + 2 * 5 - 1


def published_rows() -> dict[str, list[str]]:
    """Table 1 of the paper, encoder by encoder, as it was typed in another place."""
    return {
        "ResNet-50": [
            ".829 83.04 54.10",
            ".900 83.91 44.26",
            ".914 87.39 82.38",
            ".859 83.62 59.68",
            ".894 87.87 77.41",
        ],
        "Prov-GigaPath": [
            *(".970 92.50 85.71", ".940 90.90 80.64", ".942 91.34 79.03", ".921 87.45 70.97", ".956 91.32 93.54"),
            ".928 88.31 70.96",
        ],
        "DINOv2": [
            *(".825 86.15 69.36", ".902 87.45 74.19", ".901 86.15 90.32", ".799 80.95 61.29", ".889 88.42 72.58"),
            ".818 80.95 64.51",
        ],
        "Cyto-SSL": [
            *(".974 94.37 88.71", ".915 93.94 83.87", ".977 92.21 90.32", ".968 91.34 90.32", ".951 92.64 88.70"),
            ".966 95.67 88.70",
        ],
    }


def test_encoders_without_their_weights_are_left_out_with_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "slides.csv").write_text("slide_id,path,label,patient_id\na,a.tif,x,p\n")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "resnet50v2_stage3_imagenet.pt").touch()
    content = read_paper_study(ROOT / "configs/study/paper.yaml")
    study = SlideStudy(content, PaperStudy(content, tmp_path, tmp_path / "out", ROOT), lambda **given: None)
    assert {cell[1] for cell in study.cells()} == {"ResNet-50", "DINO", "+NCP", "+sparse", "+iRPE", "Cyto-SSL"}
    said = {message.split(" is left out")[0]: message for message in caplog.messages}
    assert set(said) == {"Prov-GigaPath", "DINOv2", "VPU"}
    assert f"its weights {tmp_path}/weights/prov_gigapath.bin are not there. The weights of" in said["Prov-GigaPath"]
    assert "huggingface.co/prov-gigapath/prov-gigapath after a request for access" in said["Prov-GigaPath"]
    assert "configs/ssl/vpu.yaml" in said["VPU"]
    table = slide_table(content, slide_rows("Cyto-SSL", 2.0), 20, study.absent)
    assert table.count("| no weights | 0 |") == 3 * 6
    assert all(f"\n{sentence}\n" in table for sentence in said.values())
    for encoder, figures in published_rows().items():  # paper beside ours
        for method, published in zip(content["slides"]["methods"], figures):
            assert f"| {encoder} | {method} | {published.replace(' ', ' / ')} | " in table
    (tmp_path / "weights" / "vpu.pt").touch()  # an encoder file of this package stands for itself
    seen: list[dict] = []
    study = SlideStudy(content, study.images, lambda **given: seen.append(given))
    study.index = lambda: tmp_path  # type: ignore[method-assign]
    study.features("VPU", 1)
    assert (seen[0]["encoder"], seen[0]["weights"]) == (tmp_path / "weights" / "vpu.pt", None)
    assert {cell[1] for cell in study.cells(["VPU", "DINOv2"])} == {"VPU"}


def test_slides_are_embedded_once_and_every_cell_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "slides").mkdir(parents=True)
    (tmp_path / "data" / "slides" / "slides.csv").write_text("slide_id,path,label,patient_id\na,a.tif,x,p\n")
    (tmp_path / "data" / "weights").mkdir()
    (tmp_path / "data" / "weights" / "resnet50v2_stage3_imagenet.pt").touch()
    content = read_paper_study(ROOT / "configs/study/paper.yaml")
    images = PaperStudy(content, tmp_path / "data", tmp_path / "out", ROOT)
    monkeypatch.setattr(images, "train", lambda run: images.folder(run) / "models" / "model.pt")
    asked: list[dict] = []

    def embed(**given: object) -> None:
        asked.append(given)
        if not (Path(str(given["output_dir"])) / "a.h5").is_file():
            bag = np.arange(24, dtype=np.float32).reshape(3, 8)
            write_features(Path(str(given["output_dir"])) / "a.h5", bag, np.zeros((3, 2), int), {"scales": 2})

    def cross(config: Path, table: Path, features: Path, folder: Path, **given: object) -> CrossValidation:
        width = read_features(features / "a.h5").features.shape[1]
        assert width == (8 if "less" in str(given["overlays"]) else 4)
        folder.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"slide_id": ["b", "a"], "patient_id": ["q", "p"]}).to_csv(folder / "predictions.csv")
        p = np.array([[0.8, 0.2], [0.1, 0.9]])
        return CrossValidation({}, p, np.array([0, 1]), ["a", "b"], np.array([0, 1]), folder / "model.pt")

    study = SlideStudy(content, images, embed)
    monkeypatch.setattr(paper_slides, "cross_validate", cross)
    monkeypatch.setattr(study, "index", lambda: tmp_path / "index")
    cells = list(study.cells())
    assert cells[0] == (0, "ResNet-50", "abmil")
    assert len(cells) == 3 * (3 * 6 + 3 * 2)
    assert [seed for seed, *_ in cells] == sorted(seed for seed, *_ in cells)
    row = study.row(1, "Cyto-SSL", "abmil")
    assert row.patients == ["p", "q"]
    assert row.figures["auc"] == 1.0
    study.row(1, "Cyto-SSL", "less")
    assert {str(a["encoder"]) for a in asked} == {str(tmp_path / "out" / "all" / "seed1" / "models" / "model.pt")}
    assert asked[0]["two_scales"] is True
    assert asked[0]["tiles_per_slide"] == 50
    study.row(0, "ResNet-50", "abmil")
    assert asked[-1]["weights"] == tmp_path / "data" / "weights" / "resnet50v2_stage3_imagenet.pt"
    with pytest.raises(InputError, match="unknown nothing"):
        list(study.cells(["nothing"]))
    with pytest.raises(InputError, match=r"slide table .* is not there"):
        SlideStudy(content, PaperStudy(content, tmp_path, tmp_path / "out", ROOT), embed)
    with pytest.raises(InputError, match="must have"):
        SlideStudy({**content, "slides": {}}, images, embed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command_makes_the_slide_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up slides, two arms of two steps, two methods: trained, indexed, embedded, cross-validated, and again."""
    for index in range(12):
        folder = tmp_path / "data" / "cells" / ("a" if index % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((96, 96, 3), 60 + 10 * index, np.uint8)).save(folder / f"{index}.png")
    make_slides(tmp_path / "data" / "slides", 8, 768, seed=5, blur=0, density=900.0, progress=False)
    content = yaml.safe_load((ROOT / "configs/study/paper.yaml").read_text())
    content["seeds"] = [0]
    tiny = content["scales"]["tiny"]
    tiny["settings"] |= {"steps": 2, "epoch_length": 2, "batch_size": 4, "backbone#num_layers": 1}
    tiny["slides"] |= {"folds": 3, "tiles_per_slide": 5, "mil": {"epochs": 1, "min_epochs": 1, "device": "cpu"}}
    rows = {"DINO": ["a", "b"], "Cyto-SSL": ["c", "d"]}
    content["slides"]["tables"] = {"Table 2": {"base": "DINO", "methods": ["abmil", "less"], "rows": rows}}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(content))
    spec = importlib.util.spec_from_file_location("paper_command", ROOT / "scripts/study/paper.py")
    assert spec is not None
    assert spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    words = ["x", "--config", str(tmp_path / "paper.yaml"), "--data", str(tmp_path / "data"), "--scale", "tiny"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path / "out"), "--slides", "--device", "cpu"])
    command.main()
    table = (tmp_path / "out" / "slides.md").read_text()
    assert "not run" not in table
    assert table.count("one seed: of the patients alone") == 2
    assert len(pd.read_csv(tmp_path / "out" / "slides.csv")) == 4
    models = sorted((tmp_path / "out" / "slides" / "mil").rglob("model.pt"))
    before = [path.stat().st_mtime_ns for path in models if path.parent.name.startswith("fold")]
    command.main()
    assert (tmp_path / "out" / "slides.md").read_text() == table
    assert [path.stat().st_mtime_ns for path in models if path.parent.name.startswith("fold")] == before
