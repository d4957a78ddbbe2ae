"""Tiles get the labels of their slides; a cohort of one kind is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cytossl_monai.transforms import LabelTilesd
from cytossl_monai.utils.errors import TableError


def table(path: Path, *labels: str) -> Path:
    rows = "".join(f"s{i},s{i}.tif,{label}\n" for i, label in enumerate(labels))
    path.write_text(f"slide_id,path,label\n{rows}")
    return path


def test_labels_are_those_of_the_slides(tmp_path: Path) -> None:
    label = LabelTilesd(table(tmp_path / "slides.csv", "nilm", "hsil", "lsil"), "nilm")
    assert [label({"slide_id": f"s{i}"})["label"] for i in range(3)] == [0, 1, 1]
    with pytest.raises(TableError, match="slide s9 is not in the slide table"):
        label({"slide_id": "s9"})


def test_cohorts_of_one_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no benign slides"):
        LabelTilesd(table(tmp_path / "a.csv", "hsil", "lsil"), "nilm")
    with pytest.raises(TableError, match="no other slides"):
        LabelTilesd(table(tmp_path / "b.csv", "nilm", "nilm"), "nilm")
    with pytest.raises(TableError, match="slide s1 has no label"):
        LabelTilesd(table(tmp_path / "c.csv", "nilm", ""), "nilm")
