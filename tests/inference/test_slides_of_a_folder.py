"""Which files of a folder are slides, and what is said of the others."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import pytest
from inference_toy import run_inference

from cytossl_monai.data.slide_table import id_of_file, read_slide_table
from cytossl_monai.inference.slides import slide_records


def test_what_opens_is_taken_and_what_is_passed_over_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    taken = ["a.jpeg", "b.btf", "c.QPTIFF", "d.czi", "e.svs", "f.bmp"]
    for name in [*taken, "scan.vsi", "image.lif", ".hidden.vsi", "slides.csv", "notes.txt"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.vsi").mkdir()
    assert [record.path.name for record in slide_records(folder=tmp_path)] == taken
    assert "2 files" in caplog.text
    assert "image.lif, scan.vsi" in caplog.text
    assert "slides.csv" not in caplog.text


@pytest.mark.parametrize(
    "name",
    ["index.html.svs", "NUL.tif", "a:b?.tif", "..tif", "x" * 240 + ".tif", "\u00e4" * 120 + ".tif", "report.csv.tif"],
)
def test_the_id_of_a_file_is_one_that_a_table_takes(tmp_path: Path, name: str) -> None:
    table = tmp_path / "slides.csv"
    table.write_text(f"slide_id,path\n{id_of_file(Path(name))},x.tif\n", encoding="utf-8")
    assert len(read_slide_table(table)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only there can a file name be any bytes")
def test_names_that_are_not_utf8_cost_nothing(cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old shares hold names in Latin-1: such a slide is read, and what is said of a broken one can be written."""
    folder = tmp_path / "share"
    folder.mkdir()
    whole = cohort.path(0).read_bytes()
    for name, content in ((b"M\xfcller.tif", whole), (b"M\xf6ller.tif", whole[: len(whole) // 2])):
        (folder / os.fsdecode(name)).write_bytes(content)
    assert [record.slide_id for record in slide_records(folder=folder)] == ["M_f6ller", "M_fcller"]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "terminal", "w", encoding="utf-8"))  # noqa: SIM115 - the run's
    settings = {"index_dir": str(tmp_path / "index"), "evidence": ["tiles", "report"]}
    status, report = run_inference(cohort, out, slides=None, dataset_dir=str(folder), **settings)
    assert status == 3
    assert {name: line.status for name, line in report.items()} == {"M_fcller": "done", "M_f6ller": "failed"}
    with open(out / "report.csv", newline="", encoding="utf-8") as stream:
        told = {row["item"]: row["message"] for row in csv.DictReader(stream)}
    assert r"M\udcf6ller.tif" in told["M_f6ller"]
    for page in (out / "index.html", out / "M_fcller" / "report.html"):
        assert page.read_text(encoding="utf-8")
