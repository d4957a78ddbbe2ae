"""Every small file that a user hands over: spoilt in the usual ways, each reader answers in one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.data.tiles.images import _load_rgb, image_size, list_images
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.data.tiles.nuclei_file import NUCLEUS_COLUMNS, NucleusTable
from cytossl_monai.engines.mil.few_shot import _known_runs
from cytossl_monai.engines.study.ablation import read_study
from cytossl_monai.engines.study.paper import read_paper_study
from cytossl_monai.index.detected import read_detections
from cytossl_monai.index.imported import read_coordinates, tissue_at
from cytossl_monai.inference.merge import _read_report
from cytossl_monai.networks.cards import read_card
from cytossl_monai.networks.weight_files import read_weights
from cytossl_monai.transforms.nuclei.imported import labels_from_geojson
from cytossl_monai.utils.errors import InputError

SLIDE: Any = SimpleNamespace(width=1000, height=1000, mpp=0.25, level_downsamples=[1.0], path="s.tif")
READERS: dict[str, Callable[[Path], Any]] = {
    "slides.csv": read_slide_table,
    "slides.json": read_slide_table,
    "images.csv": list_images,
    "images.json": list_images,
    "image.png": _load_rgb,
    "header.png": image_size,
    "index.parquet": TileIndex.read,
    "nuclei.parquet": NucleusTable.read,
    "few_shot_runs.csv": lambda path: _known_runs(path, "stamp"),
    "study.yaml": read_study,
    "paper.yaml": lambda path: read_paper_study(path, "small"),
    "coords.h5": lambda path: read_coordinates(path, SLIDE),
    "tissue.geojson": lambda path: tissue_at(path, np.zeros((1, 2)), (10, 10)),
    "tissue.png": lambda path: tissue_at(path, np.zeros((1, 2)), (10, 10)),
    "report_1_of_2.csv": _read_report,
    "card.yaml": read_card,
    "model.safetensors": read_weights,
    "model.safetensors.index.json": read_weights,
    **{
        f"cells{suffix}": lambda path: read_detections(path, (1000, 1000), 0.25)
        for suffix in (".geojson", ".json", ".csv", ".txt", ".npy", ".png", ".tif")
    },
    "nuclei.geojson": lambda path: labels_from_geojson(path, (4, 4)),
}
SPOILT = {
    "empty": b"",
    "binary": bytes(range(256)) * 20,
    "utf16": "slide_id,path\na,b\n".encode("utf-16"),
    "nested": b"[" * 20_000,
    "digits": b"[" + b"9" * 6000 + b"]",
    "number": b"7",
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "truncated": b'{"training": [{"image": "a.pn',
}


def answer(read: Callable[[Path], Any], path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(path)
    told = str(caught.value)
    assert path.name in told
    assert "\n" not in told
    assert len(told) < 600 + 2 * len(str(path))


@pytest.mark.parametrize("name", READERS)
def test_spoilt_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if not name.startswith(("few_shot", "report")):
        answer(READERS[name], path)  # absent
    for damage, content in SPOILT.items():
        path.write_bytes(content)
        if (name, damage) == ("cells.txt", "empty"):  # what Cellpose writes where it finds no cell
            READERS[name](path)
            continue
        answer(READERS[name], path)
    path.unlink()
    path.mkdir()
    if name not in ("images.csv", "images.json", "few_shot_runs.csv"):  # folders of images are images
        answer(READERS[name], path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("images.json", {"training": {"image": "a.png"}}),
        ("images.json", {"training": [7]}),
        ("images.json", [{"image": "a.png", "x": "left"}]),
        ("images.json", [{"image": "a.png", "y": float("nan")}]),
        ("images.json", [{"label": "a"}]),
        ("slides.json", {"training": [{"image": ["a"]}]}),
        ("slides.json", {"training": {"a": 1}}),
        ("model.safetensors.index.json", {"weight_map": {"a": 5}}),
        ("model.safetensors.index.json", {"weight_map": [1]}),
        ("tissue.geojson", {"type": "Polygon"}),
        ("tissue.geojson", {"features": 5}),
        ("tissue.geojson", [{"geometry": {"type": "Polygon", "coordinates": [["x"]]}}]),
        ("nuclei.geojson", {"type": "FeatureCollection", "features": [5]}),
        ("nuclei.geojson", {"type": "Polygon", "coordinates": [[[0, 1e400]]]}),
    ],
)
def test_json_of_another_shape(name: str, content: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    answer(READERS[name], tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        {"name": "x", "network": 5},
        {"name": "x", "network": None},
        {"name": "x", "mean": "red", "network": {"num_heads": 2}},
        {"name": "x", "tile_size": [1], "network": {"num_heads": 2}},
        {"name": "x", "pool": ["cls"], "network": {"num_heads": 2}},
        {"name": "x", 5: 1},
        ["name"],
    ],
)
def test_cards_of_another_shape(content: Any, tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(content))
    answer(read_card, tmp_path / "card.yaml")


def test_nothing_in_yaml_is_run(tmp_path: Path) -> None:
    for name in ("card.yaml", "study.yaml", "paper.yaml"):
        path = tmp_path / name
        path.write_text(f"name: !!python/object/apply:os.mkdir [{path}x]")
        answer(READERS[name], path)
        assert not Path(f"{path}x").exists()


@pytest.mark.parametrize(
    ("attrs", "coords"),
    [
        ({}, [[0, 0]]),
        ({"patch_size": "wide", "patch_size_level0": 256}, [[0, 0]]),
        ({"patch_size": 256, "patch_size_level0": 0}, [[0, 0]]),
        ({"patch_size": 0, "patch_size_level0": 256}, [[0, 0]]),
        ({"patch_size": 256, "patch_level": 7}, [[0, 0]]),
        ({"patch_size": 256, "patch_size_level0": 256}, [[np.nan, 0]]),
        ({"patch_size": 256, "patch_size_level0": 256}, [[-5, 0]]),
        ({"patch_size": 256, "patch_size_level0": 256}, [[b"a", b"b"]]),
        ({"patch_size": 256, "patch_size_level0": 256}, np.zeros((0, 2))),
        ({"patch_size": [1, 2], "patch_size_level0": 256}, [[0, 0]]),
    ],
)
def test_coordinates_that_cannot_be(attrs: dict[str, Any], coords: Any, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "coords.h5", "w") as file:
        file["coords"] = np.array(coords)
        file["coords"].attrs.update(attrs)
    answer(READERS["coords.h5"], tmp_path / "coords.h5")
    with h5py.File(tmp_path / "coords.h5", "w") as file:
        file.create_group("coords")
    answer(READERS["coords.h5"], tmp_path / "coords.h5")


@pytest.mark.parametrize("facts", [b"no json", b"[1]", b'{"version": "x"}', b'{"version": 99}', b"[" * 100_000])
def test_tables_of_nuclei_whose_facts_cannot_be(facts: bytes, tmp_path: Path) -> None:
    path = tmp_path / "nuclei.parquet"
    pq.write_table(pa.table({name: [1.0] for name in NUCLEUS_COLUMNS}, metadata={b"cytossl_nuclei": facts}), path)
    answer(NucleusTable.read, path)
    pq.write_table(pa.table({"x": [1.0]}, metadata={b"cytossl_nuclei": b"{}"}), path)
    answer(NucleusTable.read, path)


def test_images_that_no_memory_holds(tmp_path: Path) -> None:
    for name in ("image.png", "header.png", "tissue.png"):
        path = tmp_path / name
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
        content = bytearray(path.read_bytes())
        content[16:24] = (2**30).to_bytes(4, "big") * 2
        path.write_bytes(content)
        answer(READERS[name], path)


def test_an_image_table_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_bytes("image,label\na.png,1\n".encode("utf-8-sig"))
    [record] = list_images(tmp_path / "images.csv")
    assert (record.path.name, record.label) == ("a.png", "1")
