"""Images as bags: fields of FNAC 2019's size become windows of 256 px, and split by patient."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from cytossl_monai.data.bags.features import write_features
from cytossl_monai.data.bags.items import bag_items
from cytossl_monai.data.bags.splits import split_items
from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.index.build import IndexSettings, index_slides


def field(rng: np.random.Generator) -> np.ndarray:
    """2048 x 1536 px at 0.25 um/px: cells on glass."""
    pixels = np.full((1536, 2048, 3), 225, np.uint8)
    rows, columns = np.mgrid[-66:66, -66:66]
    for _ in range(60):
        y, x = rng.integers(66, 1470), rng.integers(66, 1980)
        part = pixels[y - 66 : y + 66, x - 66 : x + 66]
        part[rows**2 + columns**2 < 54**2] = (200, 180, 215)
        part[rows**2 + columns**2 < 18**2] = (80, 60, 130)
    return pixels


def test_an_image_is_a_bag_of_windows_side_by_side(tmp_path: Path) -> None:
    Image.fromarray(field(np.random.default_rng(0))).save(tmp_path / "a.png")
    (tmp_path / "slides.csv").write_text("slide_id,path,label,patient_id,mpp\na,a.png,benign,p0,0.25\n")
    settings = IndexSettings(tile_size=256, mpp=0.25, min_nuclei=0, min_sharpness=0.0)
    report = index_slides(read_slide_table(tmp_path / "slides.csv"), tmp_path, settings, num_workers=0, progress=False)
    assert report.exit_code == 0
    index = TileIndex.read(tmp_path / "a.parquet")
    assert (index.coords % 256 == 0).all()
    assert (index.coords.max(axis=0) <= (2048 - 256, 1536 - 256)).all()
    assert 30 < len(index) <= 48
    assert len(np.unique(index.coords, axis=0)) == len(index)


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
