"""No classifier is judged on slides that it has seen, however the table names its splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mil_toy import make_cohort

from cytossl_monai.data.bags.choice import choose_tiles
from cytossl_monai.data.bags.features import read_features
from cytossl_monai.data.bags.items import bag_items
from cytossl_monai.data.bags.seen import seen_digests, seen_items
from cytossl_monai.data.bags.splits import split_items
from cytossl_monai.engines.bundle import run_training
from cytossl_monai.engines.mil.cross_validate import CrossValidation, cross_validate
from cytossl_monai.engines.mil.few_shot import few_shot_curve
from cytossl_monai.networks.files import load_classifier
from cytossl_monai.utils.errors import SettingError
from cytossl_monai.utils.program import plain_cause

SHORT = {"epochs": 2, "min_epochs": 1, "device": "cpu"}


@pytest.fixture
def configs(repo_root: Path) -> Path:
    return repo_root / "bundles" / "cytossl_mil" / "configs"


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    make_cohort(tmp_path)
    return tmp_path


def datalist(cohort: Path, **sections: list[str]) -> Path:
    """The cohort as a MONAI datalist of these sections."""
    table = pd.read_csv(cohort / "slides.csv", dtype=str).set_index("slide_id", drop=False)
    rows = {name: table.loc[slides].to_dict("records") for name, slides in sections.items()}
    path = cohort / "list.json"
    path.write_text(json.dumps(rows))
    return path


def folds(configs: Path, cohort: Path, table: Path, **overrides: Any) -> CrossValidation:
    """A short cross-validation of three folds."""
    settings: dict[str, Any] = {"n_folds": 3, "num_workers": 0, "n_resamples": 10, "overrides": {**SHORT, **overrides}}
    return cross_validate(configs / "train.json", table, cohort / "features", cohort / "out", **settings)


def test_folds_keep_their_slides_out_whatever_the_table_says(cohort: Path, configs: Path) -> None:
    """A datalist's section "training" once put every slide, those of the test fold too, into the training."""
    names = pd.read_csv(cohort / "slides.csv")["slide_id"].tolist()
    table = datalist(cohort, training=names[:24], testing=names[24:])
    done = folds(configs, cohort, table)
    assert sorted(done.slides) == sorted(names[:24])  # what is kept for a test is in no fold
    items = {item["slide_id"]: item for item in bag_items(table, cohort / "features")}
    for fold in range(3):
        held = json.loads((cohort / "out" / f"fold_{fold}" / "fold.json").read_text())["slides"]
        seen = load_classifier(cohort / "out" / f"fold_{fold}" / "model.pt").meta["seen"]
        known = {item["slide_id"] for part in ("learned", "chosen") for item in seen_items(items.values(), seen, part)}  # type: ignore[arg-type]
        assert not known & set(held)
        assert len(known) >= 14
    ensemble = load_classifier(done.ensemble)
    assert len(seen_items(list(items.values()), ensemble.meta["seen"])) == 24
    ensemble.set_prevalence([0.9, 0.1])  # it says what its probabilities stand for, as its members do


def test_a_split_and_a_test_fold_are_not_both_taken(cohort: Path) -> None:
    items = [{**item, "split": "train"} for item in bag_items(cohort / "slides.csv", cohort / "features")]
    for name, value in (("test_fold", 1), ("holdout", 0.3)):
        with pytest.raises(ValueError, match=f"{name} {value} names test slides too"):
            split_items(items, **{name: value})  # type: ignore[arg-type]


def evaluate(cohort: Path, configs: Path, **settings: Any) -> int:
    """How many slides `evaluate.json` judges."""
    common = {"slides": str(cohort / "slides.csv"), "features_dir": str(cohort / "features"), "device": "cpu"}
    common |= {"output_dir": str(cohort / "out"), "n_resamples": 10, **settings}
    try:
        run_training([configs / "train.json", configs / "evaluate.json"], common)
    except Exception as error:  # noqa: BLE001 - raised again, unwrapped
        raise plain_cause(error) from None
    return int(json.loads((cohort / "out" / "evaluation" / "metrics.json").read_text())["n_slides"])


def train(cohort: Path, configs: Path, *overlays: Path, **settings: Any) -> None:
    common = {"slides": str(cohort / "slides.csv"), "features_dir": str(cohort / "features"), **SHORT}
    run_training([configs / "train.json", *overlays], {**common, "output_dir": str(cohort / "out"), **settings})


def test_evaluation_knows_the_slides_that_it_must_not_judge(
    cohort: Path, configs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(cohort, configs, holdout=0.3)
    held_out = evaluate(cohort, configs, holdout=0.3)
    assert 0 < held_out < 15
    assert "flatter" not in caplog.text
    for forgotten in ({}, {"holdout": 0.3, "seed": 1}, {"test_fold": 1}):
        with pytest.raises(
            Exception, match=r"model\.pt learned from \d+ of the \d+ slides to judge.*--allow_seen True"
        ):
            evaluate(cohort, configs, **forgotten)
    assert evaluate(cohort, configs, evaluate_on="all") == 30  # asked for by name: judged, and told
    assert "flatter it" in caplog.text
    assert evaluate(cohort, configs, test_fold=1, allow_seen=True) > 0


def test_validation_slides_are_judged_with_a_warning_unless_they_were_learned_from(
    cohort: Path, configs: Path, repo_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(cohort, configs)
    assert evaluate(cohort, configs) > 0
    assert "chosen and calibrated on" in caplog.text
    train(cohort, configs, repo_root / "configs" / "mil" / "discriminant.yaml")
    with pytest.raises(Exception, match="this method learns from validation slides too"):
        evaluate(cohort, configs)


def test_held_out_slides_are_judged_on_the_tiles_that_the_settings_choose(cohort: Path, configs: Path) -> None:
    done = folds(configs, cohort, cohort / "slides.csv", tiles_per_slide=3)
    for slide, fold, told in zip(done.slides[:6], done.folds[:6], done.probabilities[:6], strict=True):
        bag = read_features(cohort / "features" / f"{slide}.h5")
        rows = choose_tiles(bag.coords, int(bag.attrs.get("patch_size_level0") or 0), 3, slide, 0)
        classifier = load_classifier(cohort / "out" / f"fold_{fold}" / "model.pt").eval()
        with torch.no_grad():
            wanted = classifier(torch.from_numpy(np.asarray(bag.features, np.float32)[rows])[None])[0]
            of_all = classifier(torch.from_numpy(np.asarray(bag.features, np.float32))[None])[0]
        np.testing.assert_allclose(told, wanted, atol=1e-5)
        assert abs(float(of_all[0]) - told[0]) > 1e-6


def test_few_shot_runs_are_done_again_where_a_patient_was_corrected(cohort: Path, configs: Path) -> None:
    common = (configs / "train.json", cohort / "slides.csv", cohort / "features", cohort / "few")
    settings: dict[str, Any] = {"shots": [2], "repeats": 1, "num_workers": 0, "overrides": SHORT}
    few_shot_curve(*common, **settings)
    before = pd.read_csv(cohort / "few" / "few_shot_runs.csv")["stamp"].tolist()
    table = pd.read_csv(cohort / "slides.csv")
    table.loc[0, "patient_id"] = table.loc[2, "patient_id"]
    table.to_csv(cohort / "slides.csv", index=False)
    few_shot_curve(*common, **settings)
    assert pd.read_csv(cohort / "few" / "few_shot_runs.csv")["stamp"].tolist() != before


def test_digests_know_slides_and_patients_and_tell_no_name() -> None:
    items = [{"slide_id": f"s{n}", "patient_id": f"Smith{n // 2}"} for n in range(6)]
    seen = seen_digests(items[:2], items[2:3])
    assert [item["slide_id"] for item in seen_items(items, seen)] == ["s0", "s1"]
    assert [item["slide_id"] for item in seen_items(items, seen, "chosen")] == ["s2", "s3"]  # s3 is of the same patient
    assert seen_items([{"slide_id": "s0", "patient_id": "s0"}], seen)  # a table without patients
    assert "Smith" not in json.dumps(seen)
    assert not set(seen["learned"]) & set(seen_digests(items[:2])["learned"])  # each file has a salt of its own
    assert seen_items(items, None) == []


def test_a_cross_validation_does_not_take_what_names_other_test_slides(cohort: Path, configs: Path) -> None:
    for name, value in (("holdout", 0.3), ("splits", {}), ("items", [])):
        with pytest.raises(SettingError, match=name):
            folds(configs, cohort, cohort / "slides.csv", **{name: value})
