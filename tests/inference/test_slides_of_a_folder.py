"""Which files of a folder are slides, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

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
