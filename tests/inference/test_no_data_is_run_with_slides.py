"""Index, embedding and inference take slide ids, file names, labels and names in models as they are: nothing is run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from inference_toy import CONFIGS, make_classifier, run_inference
from monai.bundle import ConfigWorkflow

from cytossl_monai.data.bags.features import read_features
from cytossl_monai.networks.files import load_encoder, save_encoder

PRETRAIN = CONFIGS.parents[1] / "cytossl_pretrain" / "configs"


def run(config: Path, **settings: Any) -> int:
    workflow = ConfigWorkflow(str(config), workflow_type="infer", logging_file=False, **settings)
    workflow.initialize()
    try:
        workflow.run()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Path]:
    """Texts of which the first leaves a file where it is run; none has a "/": they can be file names too."""
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "marker"
    code = f"open(bytes.fromhex('{str(marker).encode().hex()}'), 'w')"
    return [f"${code}", "@encoder", "%slides", "a#b"], marker


def test_a_cohort_of_expressions(cohort: Any, tmp_path: Path, texts: tuple[list[str], Path]) -> None:
    names, marker = texts
    code = names[0]
    folder = tmp_path / "$x #1"
    folder.mkdir()
    lines = []
    for text in (names[0], names[3]):
        shutil.copy(cohort.path(1), folder / f"{text}.tif")
        lines.append({"slide_id": text, "path": f"{text}.tif", "label": code, "patient_id": text, "stain": "@stain"})
    for text in names[1:3]:
        lines.append({"slide_id": text, "path": f"{code}.tif", "label": "%x", "patient_id": code, "stain": code})
    pd.DataFrame(lines[:1] + lines[1:2]).to_csv(folder / "slides.csv", index=False)
    pd.DataFrame(lines).to_csv(folder / "all.csv", index=False)

    encoder, meta = load_encoder(cohort.encoder)
    save_encoder(folder / "encoder.pt", encoder, {**meta, "name": code, "card": {"name": "@encoder", "license": code}})
    make_classifier(folder / "classifier.pt", encoder, classes=(code, "@classes"))
    ids = {line["slide_id"] for line in lines}

    index = folder / "index"
    settings = {"slides": str(folder / "all.csv"), "output_dir": str(index), "tile_size": 96, "num_workers": 0}
    assert run(PRETRAIN / "index.json", **settings, overview=False) == 0
    assert {path.stem for path in index.glob("*.parquet")} == ids

    settings = {"slides": str(folder / "all.csv"), "index_dir": str(index), "output_dir": str(folder / "features")}
    settings |= {"encoder": str(folder / "encoder.pt"), "num_threads": 1, "progress": False}
    assert run(CONFIGS / "embed.json", **settings, device=torch.device("cpu")) == 0
    assert {path.stem for path in (folder / "features").glob("*.h5")} == ids
    assert read_features(folder / "features" / f"{code}.h5").attrs["encoder_name"] == code

    models = {"encoder": str(folder / "encoder.pt"), "classifier": str(folder / "classifier.pt")}
    for number, source in enumerate(({"slides": str(folder / "slides.csv")}, {"dataset_dir": str(folder)})):
        source = {"slides": None, **source, "index_dir": str(index), "evidence": ["tiles", "geojson", "report"]}
        status, report = run_inference(cohort, folder / f"out{number}", **models, **source)
        assert status == 0
        assert set(report) == {names[0], names[3]}
    assert not marker.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["$x #1"]
