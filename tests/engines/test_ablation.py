"""The ablation: arms differ in what they say, runs are resumed, and the table holds what was measured."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy import stats
from ssl_standins import Dots

from cytossl_monai.engines.study import ablation
from cytossl_monai.engines.study.ablation import ARMS, AblationStudy, read_study
from cytossl_monai.engines.study.representation import FIGURES, encode, labelled_task, probe, representation_table
from cytossl_monai.engines.study.table import markdown_table, write_table
from cytossl_monai.metrics.probe import fold_figure, knn_probe
from cytossl_monai.networks.files import load_encoder
from cytossl_monai.utils.errors import InputError, TableError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of stand-in images in folders."""
    root = tmp_path_factory.mktemp("data")
    for name, shade in (("dark", 0.6), ("light", 1.0)):
        (root / "cells" / name).mkdir(parents=True)
        for number, item in enumerate(Dots().__getitems__([(n, n) for n in range(15)])):
            pixels = (item["image"].permute(1, 2, 0).numpy() * shade).astype(np.uint8)
            Image.fromarray(pixels).save(root / "cells" / name / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def study(repo_root_path: Path) -> dict[str, Any]:
    """The study of the checkout, smaller."""
    content = read_study(repo_root_path / "configs" / "study" / "ablation.yaml")
    content["methods"] = {name: content["methods"][name] for name in ("simclr", "mae")}
    content["methods"]["mae"]["settings"].update(decoder_dim=16, decoder_depth=1, decoder_heads=2)
    content["settings"].update(
        {
            "image_size": 24, "image_read_mpp": 0.25, "steps": 4, "epoch_length": 2, "batch_size": 4, "log_every": 1,
            "views#global_size": 24, "backbone#img_size": 24, "backbone#patch_size": 6, "backbone#hidden_size": 12,
            "backbone#mlp_dim": 24, "backbone#num_layers": 1,
        }
    )  # fmt: skip
    content["switches"]["sr"]["on"] = {"backbone#num_salient": 3, "backbone#window": 1}
    content["tasks"] = {"cells": {"source": "cells", "field": 24, "size": 24, "n_folds": 3, "least_filled": 0.0}}
    return content


@pytest.fixture(scope="module")
def repo_root_path() -> Path:
    return Path(__file__).resolve().parents[2]


def test_arms_differ_in_their_switches_alone(study: dict, data: Path, tmp_path: Path, repo_root_path: Path) -> None:
    runs = {run.name: run.settings for run in AblationStudy(study, data, tmp_path, repo_root_path).runs()}
    assert list(runs) == [f"{method}/{arm}" for method in ("simclr", "mae") for arm in ARMS]
    plain, both = runs["simclr/plain"], runs["simclr/both"]
    assert (plain["ncp"], plain["backbone#sparsity"]) == (None, "none")
    assert both["ncp"]["ops"] == "published"
    assert "backbone#sparsity" not in both
    assert runs["simclr/ncp"] == {**plain, "ncp": both["ncp"]}
    assert (runs["mae/plain"]["mask_bias"], runs["mae/ncp"]["mask_bias"]) == (0.0, 2.0)
    assert "ncp" not in runs["mae/ncp"]
    with pytest.raises(InputError, match="unknown nothing; this study has simclr, mae"):
        AblationStudy(study, data, tmp_path, repo_root_path).runs(["nothing"])


def test_runs_once_resumes_and_refuses_other_settings(
    study: dict, data: Path, tmp_path: Path, repo_root_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = AblationStudy(study, data, tmp_path / "whole", repo_root_path)
    rows = whole.rows(["simclr"], ["both"])
    assert [(row["method"], row["arm"], row["task"], row["steps"]) for row in rows] == [("simclr", "both", "cells", 4)]
    assert rows[0]["images_per_s"] > 0

    # What is written down is what the encoder does.
    encoder, _ = load_encoder(tmp_path / "whole" / "simclr" / "both" / "models" / "model.pt")
    task = whole.tasks[0]
    assert AblationStudy(study, data, tmp_path / "seed1", repo_root_path, {"seed": 1}).tasks is whole.tasks  # read once
    again = knn_probe(encode(encoder, task.images), task.labels, task.folds).balanced_accuracy
    assert (rows[0]["knn"], rows[0]["knn_low"], rows[0]["knn_high"]) == (again.mean, again.low, again.high)

    # Killed after its first checkpoint, it ends where the whole run ended.
    halved = AblationStudy(study, data, tmp_path / "halved", repo_root_path)
    (run,) = halved.runs(["simclr"], ["both"])

    class Killed(Exception):
        pass

    from cytossl_monai.handlers.checkpoint import CheckpointHandler

    save = CheckpointHandler.save

    def save_and_die(self: CheckpointHandler, engine: Any) -> None:
        save(self, engine)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointHandler, "save", save_and_die)
        with pytest.raises(RuntimeError) as died:
            halved.train(run)
    assert isinstance(died.value.__cause__, Killed)
    weights = torch.load(halved.train(run), weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())

    # What a finished run has lost is made again.
    (tmp_path / "halved" / "simclr" / "both" / "curves.png").unlink()
    halved.train(run)
    assert (tmp_path / "halved" / "simclr" / "both" / "curves.png").is_file()

    # Done is done.
    monkeypatch.setattr(ablation, "run_training", None)
    monkeypatch.setattr(ablation, "encode", None)
    assert whole.rows(["simclr"], ["both"]) == json.loads(json.dumps(rows))
    other = AblationStudy(study, data, tmp_path / "whole", repo_root_path, {"steps": 5})
    with pytest.raises(InputError, match="holds a run with other settings"):
        other.rows(["simclr"], ["both"])


def test_table_holds_every_figure(tmp_path: Path) -> None:
    rows = [
        {
            "method": method, "arm": arm, "steps": 3, "task": task, "images": 9, "classes": 2,
            "knn": 0.5, "knn_low": 0.4, "knn_high": 0.6,
            "linear_probe": 0.7, "linear_probe_low": 0.65, "linear_probe_high": 0.75,
            "linear_probe_auc": 0.8, "linear_probe_auc_low": 0.75, "linear_probe_auc_high": 0.85,
            **{f"{name}_folds": [0.4, 0.5, 0.6 + 0.03 * (arm == "both")]
               for name in ("knn", "linear_probe", "linear_probe_auc")},
            "images_per_s": 12.3, "data_wait_share": 0.01,
        }
        for method in ("simclr", "mae") for arm in ("plain", "both") for task in ("cells", "cric")
    ]  # fmt: skip
    rows.append({k: v for k, v in {**rows[0], "method": "random weights"}.items() if k != "images_per_s"})
    table, markdown, picture = write_table(rows, tmp_path)
    with open(table, newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [float(row["knn_low"]) for row in read] == [0.4] * 9
    lines = markdown.read_text().splitlines()
    assert markdown_table(rows).splitlines() == lines
    assert lines[2] == (
        "| simclr | plain | 0.500 (0.400 to 0.600) | 0.700 (0.650 to 0.750) | 0.800 (0.750 to 0.850) "
        "| 0.500 (0.400 to 0.600) | 0.700 (0.650 to 0.750) | 0.800 (0.750 to 0.850) | 12 |"
    )
    assert lines[6].endswith("|  |  |  |  |")  # not measured: left open
    assert lines[8].startswith("Less the plain arm")
    assert lines[-1].startswith("| mae | +both | +0.010 (")
    assert len(lines) == 2 + 5 + 5 + 2
    assert np.asarray(Image.open(picture).convert("L")).std() > 5


def test_the_table_of_several_seeds_pairs_them(tmp_path: Path) -> None:
    gains = [0.02, 0.03, 0.01]
    rows = []
    for seed, gain in enumerate(gains):
        for arm, value in (("plain", 0.4 + 0.05 * seed), ("ncp", 0.4 + 0.05 * seed + gain)):
            figures = dict.fromkeys(FIGURES, value) | {f"{name}_folds": [value] * 5 for name in FIGURES}
            rows.append(
                {"method": "simclr", "arm": arm, "task": "cells", "seed": seed, "images_per_s": 10.0, **figures}
            )
    lines = markdown_table(rows).splitlines()
    wanted = stats.ttest_1samp([0.4, 0.45, 0.5], 0).confidence_interval(0.95)
    assert lines[2].startswith(f"| simclr | plain | 0.450 ({wanted.low:.3f} to {wanted.high:.3f}) |")
    wanted = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert lines[5] == "Less the plain arm, paired over the seeds:"
    assert lines[-1].startswith(f"| simclr | +NCP | +0.020 ({wanted.low:+.3f} to {wanted.high:+.3f}) |")
    # A study that was stopped within its second seed says which gain has no interval, and draws.
    table, markdown, _ = write_table(rows[:3], tmp_path)
    assert "+0.020 (one pair: no interval)" in markdown.read_text()
    assert "| simclr | +NCP | 0.420 (one seed) |" in markdown.read_text()
    with open(table, newline="") as stream:
        assert [row["seed"] for row in csv.DictReader(stream)] == ["0", "0", "1"]


def test_tasks_keep_scale_and_neighbours(tmp_path: Path, data: Path) -> None:
    task = labelled_task("cells", data / "cells", size=12, mpp=0.25, field=24, n_folds=3)
    assert task.images.shape == (30, 3, 12, 12)
    assert task.classes == ["dark", "light"]
    assert task.mpp == pytest.approx(0.5)
    assert set(probe(task.images.flatten(1).numpy(), task)) == {"knn", "linear_probe"}
    rows = ["image,label,x,y"]
    for number in range(30):
        Image.fromarray(np.full((20, 20, 3), 8 * number, np.uint8)).save(tmp_path / f"{number:03}.png")
        rows.append(f"{number:03}.png,{'ab'[number % 2]},10,10")
    (tmp_path / "cells.csv").write_text("\n".join(rows))
    blocks = labelled_task("frames", tmp_path / "cells.csv", size=8, field=8, group_block=10, n_folds=3)
    assert [len(set(blocks.folds[start : start + 10])) for start in (0, 10, 20)] == [1, 1, 1]
    with pytest.raises(TableError, match="without a label"):
        labelled_task("cells", data / "cells" / "dark")


def test_the_table_names_what_it_compares_with() -> None:
    rng = np.random.default_rng(0)

    def row(encoder: str, shift: float) -> dict[str, Any]:
        values = {name: fold_figure(list(rng.uniform(0.3, 0.5, 5) + shift)) for name in FIGURES}
        flat = {key: figure.mean for key, figure in values.items()}
        flat |= {f"{key}_{end}": getattr(figure, end) for key, figure in values.items() for end in ("low", "high")}
        return {"encoder": encoder, "task": "cric", **flat, **{f"{k}_folds": list(v.folds) for k, v in values.items()}}

    ours, plain = row("ours", 0.1), row("ResNet", 0.0)
    lines = representation_table([ours, plain], "ResNet").splitlines()
    gain = np.subtract(ours["knn_folds"], plain["knn_folds"])
    assert lines[-1].startswith(f"| cric | ours | {gain.mean():+.3f} (")
    with pytest.raises(ValueError, match="no row is named 'DINOv2'; there are ours, ResNet"):
        representation_table([ours, plain], "DINOv2")


def test_a_study_that_lacks_a_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"bundle": "x", "tsaks": {}}))
    with pytest.raises(InputError, match="tsaks"):
        read_study(path)
    with pytest.raises(InputError, match="does not exist"):
        read_study(tmp_path / "none.yaml")


def test_shards_share_the_runs_and_write_no_table(
    data: Path,
    tmp_path: Path,
    repo_root_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done: list[str] = []

    def rows(self: AblationStudy, methods: list[str], arms: list[str], device: str) -> list[dict[str, Any]]:
        done.extend(f"{self.output.name}/{method}/{arm}" for method in methods for arm in arms)
        return []

    monkeypatch.setattr(AblationStudy, "rows", rows)
    monkeypatch.setattr(ablation, "check_training", lambda *_: None)  # each run's settings: not what is asked here
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the script puts its own
    main = runpy.run_path(str(repo_root_path / "scripts/study/ablation.py"))["main"]
    words = ["ablation.py", "--data", str(data), "--output", str(tmp_path / "out"), "--shard"]
    for shard in ("1/3", "2/3", "3/3"):
        monkeypatch.setattr(sys, "argv", [*words, shard])
        main()
    config = read_study(repo_root_path / "configs/study/ablation.yaml")
    runs = AblationStudy(config, data, tmp_path, repo_root_path).runs()
    assert sorted(done) == sorted(f"seed{seed}/{run.name}" for seed in config["seeds"] for run in runs)
    assert not list(tmp_path.rglob("ablation.*"))
    monkeypatch.setattr(sys, "argv", [*words, "4/3"])
    with pytest.raises(SystemExit, match="shard 4/3 does not exist"):
        main()
    monkeypatch.setattr(sys, "argv", [*words, "1/1", "--set", "steps=3", "seed=7"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--set seed has no effect" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words, "1/1", "--seeds", "7"])
    with pytest.raises(SystemExit, match=r"none of the seeds \[7\] is one of .*ablation.yaml, which has \[0, 1, 2\]"):
        main()
