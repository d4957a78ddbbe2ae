"""Nothing that came as data reaches MONAI's configuration as text, where "$" is run, and "@" and "%" are looked up."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mil_toy import make_cohort
from monai.bundle import ConfigParser, ConfigWorkflow

from cytossl_monai.engines.bundle import as_data, run_training
from cytossl_monai.engines.mil.cross_validate import cross_validate
from cytossl_monai.engines.mil.few_shot import few_shot_curve
from cytossl_monai.networks.files import load_classifier

QUICK = {"epochs": 1, "min_epochs": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("ignite").setLevel(logging.WARNING)


@pytest.fixture
def configs(repo_root: Path) -> Path:
    return repo_root / "bundles" / "cytossl_mil" / "configs"


def hostile(root: Path) -> list[str]:
    """Texts of which the first leaves a file where it is run; none has a "/", so that they can be file names too."""
    code = f"open(bytes.fromhex('{str(root / 'marker').encode().hex()}'), 'w')"
    return [f"${code}", "@items", "%train", "a#b"]


def hostile_cohort(root: Path) -> Path:
    """A toy cohort whose table has such a text in every field."""
    make_cohort(root, n=24)
    texts = hostile(root)
    table = pd.read_csv(root / "slides.csv", dtype=str)
    for row, text in enumerate(texts, start=5):
        shutil.move(root / "features" / f"{table.loc[row, 'slide_id']}.h5", root / "features" / f"{text}.h5")
        table.loc[row, ["slide_id", "patient_id", "path"]] = text
    table["label"] = table["label"].map({"negative": "@items", "positive": texts[0]})
    table.to_csv(root / "slides.csv", index=False)
    return root / "slides.csv"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The table; its folder, below the working directory, is called like an expression too."""
    (tmp_path / "$x #1").mkdir()
    monkeypatch.chdir(tmp_path)
    return hostile_cohort(tmp_path / "$x #1").relative_to(tmp_path)


def test_cross_validation_takes_a_table_as_it_is(table: Path, configs: Path, tmp_path: Path) -> None:
    root = table.parent
    result = cross_validate(
        configs / "train.json",
        table,
        root / "features",
        root / "out",
        n_folds=3,
        overrides=QUICK,
        num_workers=0,
        n_resamples=20,
    )
    texts = hostile(tmp_path / root)
    assert set(texts) <= set(result.slides)
    assert load_classifier(root / "out" / "model.pt").classes == [texts[0], "@items"]
    assert (root / "out" / "fold_0" / "log.csv").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["$x #1"]
    assert not (root / "marker").exists()


def test_few_shot_takes_a_table_as_it_is(table: Path, configs: Path, tmp_path: Path) -> None:
    root = table.parent
    few_shot_curve(
        configs / "train.json",
        table,
        root / "features",
        root / "out",
        shots=(2,),
        repeats=1,
        overrides=QUICK,
        num_workers=0,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["$x #1"]
    assert not (root / "marker").exists()


def test_training_evaluation_and_inference_take_a_table_as_it_is(configs: Path, tmp_path: Path) -> None:
    table, out = hostile_cohort(tmp_path), tmp_path / "out"
    texts = hostile(tmp_path)
    overrides = {"features_dir": str(tmp_path / "features"), "output_dir": str(out)}
    run_training([configs / "train.json"], {**overrides, **QUICK, "slides": str(table)})
    assert load_classifier(out / "model.pt").classes == [texts[0], "@items"]
    evaluation = {**overrides, **QUICK, "slides": str(table), "n_resamples": 20, "evaluate_on": "all"}
    run_training([configs / "train.json", configs / "evaluate.json"], evaluation)
    settings: dict[str, Any] = {**overrides, "classifier": str(out / "model.pt"), "device": "cpu"}
    config = str(configs / "inference.json")
    workflow = ConfigWorkflow(config, workflow_type="infer", logging_file=False, **settings)
    workflow.initialize()
    workflow.run()  # every file of the folder: their names are the slide_ids
    for folder in (out, out / "evaluation"):
        assert len(pd.read_csv(folder / "predictions.csv")) == 24
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "value", ["$1 + 1", "@other", "%other", "a#b", ["$1 + 1", {"_target_": "os.getcwd"}], {"a": "@b"}]
)
def test_data_is_given_back_as_it_was_put_in(value: Any) -> None:
    parser = ConfigParser({"other": 5, "data": as_data(value), "used": "@data", "listed": ["@data"]})
    assert parser.get_parsed_content("data") is value
    assert parser.get_parsed_content("used") is value
    assert parser.get_parsed_content("listed")[0] is value
