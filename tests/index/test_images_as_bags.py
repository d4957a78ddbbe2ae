"""Images as bags: fields of FNAC 2019's and NIH-NLM's size become windows of 256 px, and split by patient."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cytossl_monai.data.bags.features import write_features
from cytossl_monai.data.bags.items import bag_items
from cytossl_monai.data.bags.splits import split_items
from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.index.build import IndexSettings, index_slides

PAGES = Path(__file__).resolve().parents[2] / "docs" / "howto"


def field(rng: np.random.Generator, width: int, height: int, cells: int) -> np.ndarray:
    """A field at 0.25 um/px: cells on glass."""
    pixels = np.full((height, width, 3), 225, np.uint8)
    rows, columns = np.mgrid[-66:66, -66:66]
    for _ in range(cells):
        y, x = rng.integers(66, height - 66), rng.integers(66, width - 66)
        part = pixels[y - 66 : y + 66, x - 66 : x + 66]
        part[rows**2 + columns**2 < 54**2] = (200, 180, 215)
        part[rows**2 + columns**2 < 18**2] = (80, 60, 130)
    return pixels


@pytest.mark.parametrize(("width", "height", "cells"), [(2048, 1536, 60), (5312, 2988, 200)], ids=["fnac", "nih_nlm"])
def test_an_image_is_a_bag_of_windows_side_by_side(tmp_path: Path, width: int, height: int, cells: int) -> None:
    Image.fromarray(field(np.random.default_rng(0), width, height, cells)).save(tmp_path / "a.jpg", quality=95)
    (tmp_path / "slides.csv").write_text("slide_id,path,label,patient_id,mpp\na,a.jpg,benign,p0,0.25\n")
    settings = IndexSettings(tile_size=256, mpp=0.25, min_nuclei=0, min_sharpness=0.0)
    report = index_slides(
        read_slide_table(tmp_path / "slides.csv"), tmp_path, settings, 0, overview=False, progress=False
    )
    assert report.exit_code == 0
    index = TileIndex.read(tmp_path / "a.parquet")
    assert (index.coords % 256 == 0).all()
    assert (index.coords < (width, height)).all()
    windows = -(-width // 256) * -(-height // 256)
    assert 0.6 * windows < len(index) <= windows
    assert len(np.unique(index.coords, axis=0)) == len(index)


@pytest.mark.parametrize("page", ["fnac", "nih_nlm"])
def test_the_table_of_the_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page's own lines write of files that lie as it says: labels, and patients that hold together."""
    for label in ("benign", "malignant"):
        for number in range(6):
            place = Path("FNAC", label) if page == "fnac" else Path("smears", label, f"{label}{number // 3}")
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            (tmp_path / place / f"{number}.jpg").touch()
    monkeypatch.chdir(tmp_path)
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], {})
    records = read_slide_table(tmp_path / "slides.csv")
    assert [r.label for r in records] == ["benign"] * 6 + ["malignant"] * 6
    assert {r.mpp for r in records} == {0.25}
    assert all(r.path.is_file() for r in records)
    patients = {r.patient_id for r in records}
    assert len(patients) == (12 if page == "fnac" else 4)


def test_images_of_a_patient_stay_on_one_side(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"i{i}", f"i{i}.png", ["healthy", "infected"][i // 5 % 2], f"p{i // 5}", 0.25) for i in range(60)]
    with open(tmp_path / "slides.csv", "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["slide_id", "path", "label", "patient_id", "mpp"])
        table.writerows(rows)
    for name, *_ in rows:
        write_features(tmp_path / f"{name}.h5", rng.random((6, 4)), np.arange(12).reshape(6, 2), {"encoder": "x"})
    items = bag_items(tmp_path / "slides.csv", tmp_path)
    sides = split_items(items, n_folds=4, holdout=0.3)
    patients = {side: {item["patient_id"] for item in some} for side, some in sides.items()}
    assert sum(len(some) for some in sides.values()) == 60
    assert not patients["train"] & patients["test"]
    assert not patients["val"] & patients["test"]
    assert len(patients["test"]) == 4  # 30 % of six patients of either kind, rounded
