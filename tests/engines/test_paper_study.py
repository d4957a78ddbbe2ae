"""The paper's study: arms and seeds, resumed, and a table that says what it knows."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cytossl_monai.engines.study.paper import PaperStudy, paired_over_seeds, paper_table, read_paper_study
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
    with pytest.raises(InputError, match="no scale 'huge'; it has small, full"):
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
