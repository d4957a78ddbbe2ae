"""Marked cells: read from QuPath's files and tables, joined with bags, learned from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cytossl_monai.data.bags.features import read_features, write_features
from cytossl_monai.engines.bundle import run_training
from cytossl_monai.engines.mil.cross_validate import cross_validate
from cytossl_monai.engines.mil.few_shot import few_shot_curve
from cytossl_monai.engines.mil.marks import with_marks
from cytossl_monai.networks import CellDiscriminant
from cytossl_monai.utils.errors import FeatureError, InputError, SettingError, TableError
from cytossl_monai.utils.program import plain_cause

CLASSES = ["negative", "hsil"]


def bag(folder: Path, name: str, label: int, coords: np.ndarray, cells: bool = True) -> dict[str, Any]:
    attrs: dict[str, Any] = {"patch_size_level0": 96, "level0_mpp": 0.25, "encoder": "abc"}
    attrs |= {"instances": "nuclei"} if cells else {}
    features = np.random.default_rng(len(name) + label).standard_normal((len(coords), 4)).astype("f4")
    write_features(folder / f"{name}.h5", features, coords, attrs)
    return {
        "slide_id": name,
        "patient_id": name,
        "features": str(folder / f"{name}.h5"),
        "label": label,
        "label_name": CLASSES[label],
        "classes": CLASSES,
    }


def geojson(path: Path, objects: list[tuple[dict[str, Any], str | None]]) -> None:
    features = [
        {
            "type": "Feature",
            "geometry": geometry,
            "properties": {"objectType": "annotation"} | ({} if name is None else {"classification": {"name": name}}),
        }
        for geometry, name in objects
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def point(x: float, y: float) -> dict[str, Any]:
    return {"type": "Point", "coordinates": [x, y]}


@pytest.fixture
def items(tmp_path: Path) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        bag(tmp_path, name, label, rng.integers(0, 5000, (200, 2))) for name, label in (("a", 1), ("b", 0), ("c", 1))
    ]


def test_a_mark_is_of_the_nearest_nucleus_in_whose_field_it_lies(items: list[dict[str, Any]], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    centres = read_features(items[0]["features"]).coords + 48.0
    places = np.concatenate([centres[:30] + rng.uniform(-60, 60, (30, 2)), rng.uniform(0, 5096, (30, 2))])
    (tmp_path / "marks").mkdir()
    geojson(tmp_path / "marks" / "a.geojson", [(point(x, y), "HSIL") for x, y in places])
    expected = set()
    for place in places:
        nearest = min(range(len(centres)), key=lambda row: float(np.hypot(*(centres[row] - place))))
        if max(abs(centres[nearest] - place)) <= 48:
            expected.add(nearest)
    assert 0 < len(expected) < 60
    found = with_marks(items, tmp_path / "marks")
    assert found[0]["marks"] == [[row, 1] for row in sorted(expected)]
    assert all("marks" not in item for item in found[1:])
    assert "marks" not in items[0]


def test_a_mark_is_of_the_tile_that_it_lies_in(tmp_path: Path) -> None:
    coords = np.stack(np.meshgrid(np.arange(5), np.arange(4)), -1).reshape(-1, 2) * 96
    item = bag(tmp_path, "a", 1, coords, cells=False)
    (tmp_path / "marks.csv").write_text("slide_id,x,y,label\na,100,5,hsil\na,470,380,hsil\na,900,5,hsil\n")
    assert with_marks([item], tmp_path / "marks.csv")[0]["marks"] == [[1, 1], [19, 1]]


def test_outlines_points_and_classes_of_qupath(items: list[dict[str, Any]], tmp_path: Path) -> None:
    centres = (read_features(items[2]["features"]).coords + 48.0).tolist()
    x, y = centres[3]
    ring = [[x - 20, y - 8], [x + 20, y - 8], [x + 20, y + 8], [x - 20, y + 8], [x - 20, y - 8]]
    geojson(
        tmp_path / "c.geojson",
        [
            ({"type": "Polygon", "coordinates": [ring]}, "hsil"),
            ({"type": "MultiPoint", "coordinates": centres[10:12]}, "Hsil"),
            (point(*centres[20]), "negative"),  # of the first class: left out
            (point(*centres[21]), None),  # not classified
            (point(*centres[22]), "Ignore*"),
        ],
    )
    assert [row for row, _ in with_marks(items, tmp_path)[2]["marks"]] == [3, 10, 11]


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        ("slide_id,x,y,label\na,10,10,lsil\n", InputError, "no object is classified as hsil .found: lsil"),
        ("slide_id,x,y,label\nz,10,10,hsil\n", InputError, "none of a slide of the table; it has marks of z"),
        ("slide_id,x,y,label\n", InputError, "none of a slide of the table"),
        ("slide_id,x,y,label\na,9999,9999,hsil\n", FeatureError, "none of the 1 lies on a cell"),
        ("slide_id,x,y,label\nb,10,10,hsil\n", TableError, "slide b is negative, but a cell in it is marked hsil"),
        ("slide_id,x,label\na,10,hsil\n", TableError, "it has no column y"),
        ("slide_id,x,y,label\na,left,10,hsil\n", TableError, "cannot be read as a table"),
        ("slide_id,x,y,label\na,,10,hsil\n", TableError, "a row lacks a value"),
    ],
)
def test_marks_that_cannot_be_used_are_named(
    items: list[dict[str, Any]], tmp_path: Path, table: str, error: type[Exception], words: str
) -> None:
    (tmp_path / "m.csv").write_text(table)
    with pytest.raises(error, match=words):
        with_marks(items, tmp_path / "m.csv")


def test_a_broken_file_of_qupath_is_named(items: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "a.geojson").write_text("{")
    with pytest.raises(InputError, match=r"a\.geojson"):
        with_marks(items, tmp_path)


def test_strangers_are_left_out_and_told(
    items: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x, y = read_features(items[0]["features"]).coords[5] + 48
    rows = [f"a,{x},{y},hsil", f"a,{x},{y},doubtful", f"zz,{x},{y},hsil", "a,99999,1,hsil"]
    (tmp_path / "m.csv").write_text("\n".join(["slide_id,x,y,label", *rows]))
    with caplog.at_level("WARNING"):
        assert with_marks(items, tmp_path / "m.csv")[0]["marks"] == [[5, 1]]
    for words in (
        "marks of doubtful are left out",
        "not in the training are left out: zz",
        "1 of 2 marks lie on no cell",
    ):
        assert words in caplog.text


def confounded(
    seed: int, slides: int = 24
) -> tuple[list[tuple[torch.Tensor, int]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Bags in which positive slides have 3 lesion cells of 100, more and stronger ones of another kind, and 2 marks."""
    rng = np.random.default_rng(seed)
    lesion, other = np.eye(16)[0] * 3.5, np.eye(16)[1] * 5.0
    bags, marked = [], []
    for number in range(slides):
        label = number % 2
        cells = rng.standard_normal((100, 16)) + 0.3 * rng.standard_normal(16)
        cells[: 3 * label] += lesion
        cells[20 : 20 + int(rng.integers(0, 12 + 6 * label))] += other
        features = torch.from_numpy(cells.astype("f4"))
        bags.append((features, label))
        marked.append((features[: 2 * label], torch.full((2 * label,), 1)))
    return bags, marked


def test_marks_find_the_lesion_cells_where_labels_of_slides_find_others() -> None:
    bags, marked = confounded(0)
    fresh = confounded(1)[0]
    ranks = {}
    for name, shown in (("labels", None), ("marks", marked)):
        network = CellDiscriminant(16, 2)
        network.set_standardisation(torch.zeros(16), torch.ones(16))
        network.learn_bags(bags, None, shown)
        hits = [int((network(f[None]).scores[0, :, 1].topk(3).indices < 3).sum()) for f, label in fresh if label]
        ranks[name] = float(np.mean(hits))
    assert ranks["marks"] > 1.8, ranks
    assert ranks["labels"] < 1.0, ranks


def test_the_direction_is_fishers_of_the_marked_cells() -> None:
    """Against a naive computation without self-training: whitened difference of means, slides counting alike."""
    bags, marked = confounded(2, 10)
    network = CellDiscriminant(16, 2, shrinkage=1e-3, rounds=0)
    network.set_standardisation(torch.zeros(16), torch.ones(16))
    network.learn_bags(bags, None, marked)
    cells = [f.double().numpy() for f, _ in bags]
    labels = np.array([label for _, label in bags])
    means = np.stack([c.mean(0) for c in cells])
    within = means - np.stack([means[labels == label].mean(0) for label in labels])
    covariance = np.mean([c.T @ c / len(c) for c in cells], 0) - np.outer(means.mean(0), means.mean(0))
    covariance += 20 * within.T @ within / len(cells) + 1e-3 * np.eye(16)
    shown = np.mean([m.double().numpy().mean(0) for m, _ in marked if len(m)], 0)
    expected = np.linalg.solve(covariance, shown - means[labels == 0].mean(0))
    found = network.directions[:, 0].double().numpy()
    assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.999


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Slides of `confounded` with places, a table, and marks of the first two cells of each positive slide."""
    rows, marks = ["slide_id,path,label,patient_id"], ["slide_id,x,y,label"]
    for number, (features, label) in enumerate(confounded(3)[0]):
        coords = np.stack([np.arange(100) * 100, np.full(100, 50)], 1)
        attrs = {
            "patch_size_level0": 96,
            "level0_mpp": 0.25,
            "encoder": "abc",
            "encoder_name": "t",
            "instances": "nuclei",
        }
        write_features(tmp_path / "features" / f"s{number}.h5", features.numpy(), coords, attrs)
        rows.append(f"s{number},s{number}.svs,{CLASSES[label]},p{number}")
        marks += [f"s{number},{48 + 100 * k},98,hsil" for k in range(2 * label)]
    (tmp_path / "slides.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "marks.csv").write_text("\n".join(marks) + "\n")
    return tmp_path


def test_cross_validation_learns_from_marks_and_trains_anew_when_they_change(cohort: Path, repo_root: Path) -> None:
    train = repo_root / "bundles" / "cytossl_mil" / "configs" / "train.json"
    common: dict[str, Any] = {
        "overlays": [repo_root / "configs" / "mil" / "discriminant.yaml"],
        "overrides": {"device": "cpu"},
        "n_folds": 3,
        "num_workers": 0,
        "n_resamples": 20,
    }
    files = train, cohort / "slides.csv", cohort / "features"
    plain = cross_validate(*files, cohort / "mil", **common).intervals["auc"].value
    marked = cross_validate(*files, cohort / "mil", **common, marks=cohort / "marks.csv").intervals["auc"].value
    assert plain < 0.7 < 0.8 < marked


def test_methods_that_cannot_learn_from_marks_refuse_them(cohort: Path, repo_root: Path) -> None:
    train = repo_root / "bundles" / "cytossl_mil" / "configs" / "train.json"
    settings = {
        "slides": str(cohort / "slides.csv"),
        "features_dir": str(cohort / "features"),
        "output_dir": str(cohort / "out"),
        "marks": str(cohort / "marks.csv"),
        "classes": CLASSES,
        "device": "cpu",
    }
    with pytest.raises(RuntimeError) as caught:  # MONAI wraps it; a program says what is inside
        run_training([train], settings)
    assert isinstance(plain_cause(caught.value), SettingError)
    assert re.search(r"ABMIL learns from labels of slides alone.*discriminant\.yaml", str(plain_cause(caught.value)))
    with pytest.raises(SettingError, match="marks"):
        few_shot_curve(
            train, cohort / "slides.csv", cohort / "features", cohort / "few", overrides={"marks": settings["marks"]}
        )
