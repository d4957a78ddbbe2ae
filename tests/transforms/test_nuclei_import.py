"""Nuclei from elsewhere go in the same way: instance maps, masks, GeoJSON of QuPath."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from nuclei_drawings import Disc, draw
from skimage.io import imsave

from cytossl_monai.transforms.ncp.dictionary import RandNucleiCenteredPerturbd
from cytossl_monai.transforms.nuclei.array import LoadNuclei, SegmentNuclei
from cytossl_monai.transforms.nuclei.dictionary import LoadNucleid
from cytossl_monai.transforms.nuclei.imported import labels_from_geojson, labels_from_map
from cytossl_monai.transforms.views.dictionary import RandCropAtNucleusd
from cytossl_monai.utils.errors import InputError
from cytossl_monai.visualize.geojson import feature_collection

image, truth = draw([Disc(16, 18, 8), Disc(46, 20, 8)])


def feature(rings: list[list[list[float]]], key: str = "geometry", **more: Any) -> dict[str, Any]:
    return {"type": "Feature", key: {"type": "Polygon", "coordinates": rings}, **more}


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def test_maps_and_masks() -> None:
    sparse = np.where(truth == 2, 40_000, truth).astype(np.uint16)
    np.testing.assert_array_equal(labels_from_map(sparse), truth)
    np.testing.assert_array_equal(labels_from_map(torch.from_numpy(truth)[None].float()), truth)
    for mask in (truth > 0, (truth > 0).astype(np.uint8) * 255, (truth > 0).astype(np.float32)):
        found = labels_from_map(mask)
        assert found.max() == 2
        np.testing.assert_array_equal(found > 0, truth > 0)
    assert labels_from_map(np.zeros((4, 5), bool)).shape == (4, 5)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 4, 4)), "shape"),
        (np.full((4, 4), 0.5), "whole numbers"),
        (np.full((4, 4), -1), "whole numbers"),
        (np.full((4, 4), np.nan), "whole numbers"),
        (np.full((4, 4), "a"), "whole numbers"),
    ],
)
def test_what_is_no_map_is_refused(array: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        labels_from_map(array, "theirs")


def test_polygons_cover_the_pixels_whose_centres_they_hold() -> None:
    content = {"type": "FeatureCollection", "features": [feature([square(2, 3, 4)]), feature([square(10, 1, 2)])]}
    expected = np.zeros((9, 14), np.int32)
    expected[3:7, 2:6] = 1
    expected[1:3, 10:12] = 2
    np.testing.assert_array_equal(labels_from_geojson(content, (9, 14)), expected)
    # The same objects seen by a tile at (100, 50) of a slide that is shown at half the resolution.
    moved = [feature([[[100 + 2 * x, 50 + 2 * y] for x, y in square(*s)]]) for s in ((2, 3, 4), (10, 1, 2))]
    np.testing.assert_array_equal(labels_from_geojson(moved, (9, 14), (100, 50), 2.0), expected)


def test_holes_parts_cells_and_what_has_no_area() -> None:
    ring = feature([square(1, 1, 8), square(3, 3, 4)])
    found = labels_from_geojson(ring, (10, 10))
    assert found.sum() == 64 - 16
    parts = {
        "type": "Feature",
        "geometry": {"type": "MultiPolygon", "coordinates": [[square(0, 0, 2)], [square(5, 5, 3)]]},
    }
    assert labels_from_geojson(parts, (10, 10)).sum() == 4 + 2 * 9  # CellViT: a class is one object of many nuclei
    cell = feature([square(0, 0, 9)], nucleusGeometry={"type": "Polygon", "coordinates": [square(3, 3, 3)]})
    assert (labels_from_geojson(cell, (10, 10)) > 0).sum() == 9
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [3, 3]}}
    outside = feature([square(50, 50, 5)])
    assert not labels_from_geojson([point, outside, {"type": "Feature", "geometry": None}], (10, 10)).any()


@pytest.mark.parametrize("last", [True, False])
def test_an_annotation_beside_detections_is_no_nucleus(last: bool) -> None:
    detections = [feature([square(x, 2, 3)], properties={"objectType": "detection"}) for x in (1, 6)]
    around = feature([square(0, 0, 10)], properties={"objectType": "annotation", "name": "region"})
    found = labels_from_geojson([*detections, around] if last else [around, *detections], (10, 10))
    assert (found.max(), (found > 0).sum()) == (2, 18)
    assert labels_from_geojson([around], (10, 10)).all()  # annotations alone: nuclei outlined by hand


def test_geometries_of_every_form(tmp_path: Path) -> None:
    one, two = ({"type": "Polygon", "coordinates": [square(x, 1, 3)]} for x in (1, 6))
    expected = labels_from_geojson([feature(one["coordinates"]), feature(two["coordinates"])], (10, 10))
    assert expected.max() == 2
    collection = {"type": "GeometryCollection", "geometries": [one, two, {"type": "Point", "coordinates": [1, 1]}]}
    for content in (
        [one, two],
        collection,
        {"type": "Feature", "geometry": collection, "properties": None},
        {"type": "MultiPolygon", "coordinates": [one["coordinates"], two["coordinates"], [], [[]]]},
        {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": g} for g in (one, two)]},
        [feature([[]]), one, feature([]), two],
    ):
        np.testing.assert_array_equal(labels_from_geojson(content, (10, 10)), expected)
    path = tmp_path / "bom.geojson"
    path.write_text(json.dumps(collection), encoding="utf-8-sig")
    np.testing.assert_array_equal(labels_from_geojson(path, (10, 10)), expected)
    assert not labels_from_geojson({"type": "FeatureCollection", "features": []}, (10, 10)).any()


@pytest.mark.parametrize(
    "content",
    [
        {"cells": [{"contour": [[0, 0], [1, 1]]}]},
        {"nuc": {"1": {}}},
        {"type": "FeatureCollection"},
        {"type": "FeatureCollection", "features": {"a": 1}},
        [1, 2],
        ["a"],
        [{"bbox": [1, 2, 3, 4]}],
        3,
        None,
        {"type": "Feature", "geometry": {"type": "Polygon"}},
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": "x"}},
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[["a", "b"]]]}},
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [float("nan"), 1], [1, 1]]]}},
        {"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [3]}},
    ],
)
def test_json_that_is_no_geojson_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "cells.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"cells\.json"):
        labels_from_geojson(path, (10, 10))
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot be read as JSON"):
        labels_from_geojson(path, (10, 10))


def test_files_of_each_kind_give_what_segmentation_gives(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", truth)
    imsave(tmp_path / "m.png", (truth > 0).astype(np.uint8) * 255, check_contrast=False)
    corners = [np.argwhere(truth == k) for k in (1, 2)]
    boxes = [square(float(c[:, 1].min()), float(c[:, 0].min()), float(np.ptp(c[:, 0]) + 1)) for c in corners]
    (tmp_path / "m.geojson").write_text(json.dumps([feature([box]) for box in boxes]))
    like = SegmentNuclei(0.5, output="labels")(image)
    for name in ("m.npy", "m.png", "m.geojson"):
        found = LoadNuclei(output="labels")(tmp_path / name, image)
        assert (found.dtype, found.shape, found.max()) == (like.dtype, like.shape, 2)
    everything = LoadNuclei(0.5, "all")(tmp_path / "m.npy", image)
    assert everything.table["diameter_um"].tolist() == pytest.approx([8, 8], rel=0.05)


def test_they_go_on_through_crop_and_perturbation(tmp_path: Path) -> None:
    tile = MetaTensor(torch.from_numpy(image))
    (tmp_path / "cells.geojson").write_text(json.dumps([feature([square(1000 + 60, 500 + 64, 40)])]))
    pipeline = Compose(
        [
            LoadNucleid("theirs", labels_keys="labels"),
            RandCropAtNucleusd(["image", "nuclei"], 48),
            RandNucleiCenteredPerturbd("image", "strong", mpp=0.5),
        ]
    ).set_random_state(0)
    sample = {"image": tile, "theirs": tmp_path / "cells.geojson", "x": 1000, "y": 500, "size": 256}
    out = pipeline(sample)
    assert out["nuclei"].shape == (1, 48, 48)
    assert out["nuclei"].sum() == 20 * 20
    assert out["labels"].shape == (1, 128, 128)
    corner = np.argwhere(out["labels"][0].numpy()).min(0)
    assert corner.tolist() == [32, 30]
    inside = out["nuclei"].bool().expand(3, -1, -1)
    assert torch.equal(out["image"].as_tensor()[inside], tile.as_tensor()[:, 32:52, 30:50].flatten())


def test_what_goes_to_qupath_and_comes_back_lies_where_it_was(tmp_path: Path) -> None:
    """Of an MRXS slide, whose scanned part begins at (300, 700): QuPath counts from there, both ways."""
    bounds, tile = (300, 700), np.array([[1000, 1500]])
    shown = np.array([0.9])
    content = feature_collection("s", tile, 64, shown, {}, np.array([], int), bounds_offset=bounds)
    [sent] = content["features"]
    assert sent["geometry"]["coordinates"][0][0] == [700, 800]
    sent["properties"]["objectType"] = "detection"
    (tmp_path / "cells.geojson").write_text(json.dumps(content))
    sample = {"image": torch.zeros(3, 64, 64), "theirs": tmp_path / "cells.geojson", "x": 984, "y": 1484, "size": 128}
    back = LoadNucleid("theirs")({**sample, "bounds_offset": bounds})["nuclei"][0]
    assert np.argwhere(back.numpy()).min(0).tolist() == [8, 8]
    assert np.argwhere(back.numpy()).max(0).tolist() == [39, 39]
    np.testing.assert_array_equal(labels_from_geojson(content, (64, 64), (984, 1484), 2.0, bounds) > 0, back)
    assert not LoadNucleid("theirs")(sample)["nuclei"].equal(back[None])  # without, it lies elsewhere


def test_bad_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "torn.geojson").write_text('{"type": "Feature')
    (tmp_path / "list.json").write_text('"text"')
    (tmp_path / "torn.npy").write_text("no array")
    for empty in ("empty.npy", "empty.png", "empty.tif"):
        (tmp_path / empty).touch()
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx")
    absurd = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000, 10000000), }".ljust(117) + b"\n"
    (tmp_path / "absurd.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + absurd)
    for name, words in (
        ("empty.npy", r"empty.npy cannot be read as an instance map \(No data left"),
        ("empty.png", "empty.png cannot be read"),
        ("empty.tif", "empty.tif cannot be read"),
        ("torn.png", r"torn.png cannot be read as an instance map \(broken PNG"),
        ("absurd.npy", "absurd.npy cannot be read as an instance map"),
        ("torn.geojson", "torn.geojson cannot be read as JSON"),
        ("list.json", "list.json is no GeoJSON"),
        ("absent.geojson", "absent.geojson cannot be read"),
        ("torn.npy", "torn.npy cannot be read"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            LoadNuclei()(tmp_path / name, image)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="Polygon whose rings"):
        labels_from_geojson(feature([[1.0, 2.0]]), (4, 4))
    with pytest.raises(ValueError, match="downsample is 0"):
        labels_from_geojson([], (4, 4), downsample=0)
    with pytest.raises(ValueError, match=r"Key 'theirs': mask has the size \(4, 4\)"):
        LoadNucleid("theirs")({"image": image, "theirs": np.zeros((4, 4), np.int32)})
    with pytest.raises(ValueError, match="image is missing"):
        LoadNucleid("theirs")({"theirs": truth})
    with pytest.raises(ValueError, match="output is"):
        LoadNuclei(output="box")
    with pytest.raises(ValueError, match="mpp is missing"):
        LoadNuclei(output="all")(truth, image)
