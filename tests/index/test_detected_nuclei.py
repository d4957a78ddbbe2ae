"""Files of detectors beside the index serve pretraining: each format against the map that the test drew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

from cytossl_monai.data import TileCache, TileDataset, TileIndex, tile_loader
from cytossl_monai.data.tiles.dataset import MixedDataset, collate_tiles
from cytossl_monai.data.tiles.nuclei_file import NucleusTable, nuclei_path
from cytossl_monai.index import detected_nuclei, read_detections
from cytossl_monai.transforms import BatchedNCP, ViewGenerator
from cytossl_monai.utils.errors import InputError

SIDE, TILE, MPP = 256, 64, 0.5


def true_map() -> np.ndarray:
    """(SIDE, SIDE) int32: discs, two of them touching along a line."""
    labels = np.zeros((SIDE, SIDE), np.int32)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    for number, (cx, cy, radius) in enumerate([(40, 40, 9), (150, 70, 7), (20, 200, 6), (120, 130, 11)], start=1):
        labels[(x - cx) ** 2 + (y - cy) ** 2 <= radius**2] = number
    labels[180:196, 180:192], labels[180:196, 192:206] = 5, 6
    return labels


TRUTH = true_map()
TILES = [(16, 16), (120, 40), (0, 170), (100, 100), (170, 160), (64, 190)]


def contours() -> list[np.ndarray]:
    """Border pixels of each nucleus in order, as a detector's outlines go: numbers of pixels, x and y."""
    rings = []
    for number in range(1, TRUTH.max() + 1):
        rows, columns = np.nonzero(number == TRUTH)
        left = [(columns[rows == y].min(), y) for y in range(rows.min(), rows.max() + 1)]
        right = [(columns[rows == y].max(), y) for y in range(rows.max(), rows.min() - 1, -1)]
        rings.append(np.array([*left, *right], dtype=float))
    return rings


def make_index(folder: Path, name: str = "s1") -> Path:
    """A slide that shows the nuclei dark, and its index."""
    pixels = np.where(TRUTH > 0, 60, 220).astype(np.uint8)[..., None].repeat(3, 2)
    slide = folder / f"{name}.tif"
    tifffile.imwrite(slide, pixels, tile=(256, 256), photometric="rgb")
    xy = np.array(TILES)
    table = pd.DataFrame({"slide_id": name, "x": xy[:, 0], "y": xy[:, 1], "size": TILE, "level": 0, "mpp": MPP})
    table = table.assign(n_nuclei=1, nuclei_fraction=0.1, foreground_fraction=0.5, sharpness=1.0)
    meta = {"slide_id": name, "slide_path": str(slide), "level0_mpp": MPP, "width": SIDE, "height": SIDE}
    index = folder / "index"
    index.mkdir(exist_ok=True)
    TileIndex(table, {**meta, "settings": {"tile_size": TILE, "mpp": MPP}}).write(index / f"{name}.parquet")
    return index


def polygon_feature(ring: np.ndarray) -> dict[str, object]:
    # QuPath's places are borders of pixels: around the border pixels goes a line half a pixel further out.
    middle = ring.mean(0)
    out = ring + 0.5 + np.sign(ring - middle) * 0.5
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[*out.tolist(), out[0].tolist()]]}}


def write_format(kind: str, folder: Path) -> None:
    """What the detector would have written of the slide ``s1``."""
    folder.mkdir(exist_ok=True)
    rings = contours()
    if kind == "cellvit":  # a folder a slide
        (folder / "s1").mkdir()
        cells = [{"centroid": r.mean(0).tolist(), "contour": r.tolist(), "type": 1} for r in rings]
        (folder / "s1" / "cells.json").write_text(json.dumps({"wsi_metadata": {}, "cells": cells}))
    elif kind == "cellvit geojson":  # a class is one object of many nuclei
        parts = [polygon_feature(r)["geometry"]["coordinates"] for r in rings]
        content = [{"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": parts}}]
        (folder / "s1_cells.geojson").write_text(json.dumps(content))
    elif kind == "cellpose masks":
        Image.fromarray(TRUTH.astype(np.uint16)).save(folder / "s1_cp_masks.png")
    elif kind == "cellpose outlines":
        lines = [",".join(str(int(v)) for v in r.flatten()) for r in rings]
        (folder / "s1_cp_outlines.txt").write_text("\n".join(lines) + "\n")
    elif kind == "stardist":
        tifffile.imwrite(folder / "s1.tif", TRUTH.astype(np.uint16))
    elif kind == "qupath":
        content = {"type": "FeatureCollection", "features": [polygon_feature(r) for r in rings]}
        (folder / "s1.geojson").write_text(json.dumps(content))
    elif kind == "instanseg":  # nuclei, then cells
        tifffile.imwrite(folder / "s1_instanseg_prediction.tiff", np.stack([TRUTH, np.ones_like(TRUTH)]))
    elif kind == "npy":
        np.save(folder / "s1.npy", TRUTH)


MASKS = ["cellvit", "cellvit geojson", "cellpose masks", "cellpose outlines", "stardist", "qupath", "instanseg", "npy"]


@pytest.mark.parametrize("kind", MASKS)
def test_each_format_gives_the_nuclei_of_every_tile(kind: str, tmp_path: Path) -> None:
    index = make_index(tmp_path)
    write_format(kind, tmp_path / "found")
    data = TileDataset(index, nuclei=detected_nuclei(index, tmp_path / "found"))
    exact = kind in ("cellpose masks", "stardist", "instanseg", "npy")
    for number, (x, y) in enumerate(TILES):
        item = data[number]
        assert (item["nuclei"].dtype, tuple(item["nuclei"].shape)) == (torch.int16, (1, TILE, TILE))
        drawn, wanted = item["nuclei"][0].numpy(), np.zeros((TILE, TILE), np.int32)
        part = TRUTH[y : y + TILE, x : x + TILE]
        wanted[: part.shape[0], : part.shape[1]] = part
        assert len(np.unique(drawn)) == len(np.unique(wanted))  # touching ones stay apart
        for label in np.unique(wanted)[1:]:
            here = wanted == label
            numbers, counts = np.unique(drawn[here], return_counts=True)
            match = drawn == numbers[counts.argmax()]
            overlap = (here & match).sum() / (here | match).sum()
            assert overlap == 1 if exact else overlap > 0.7, (kind, overlap)


@pytest.mark.parametrize("kind", ["csv", "cell_detection", "geojson points"])
def test_points_serve_as_discs(kind: str, tmp_path: Path) -> None:
    index = make_index(tmp_path)
    points = np.array([[40.0, 40.0], [150.0, 70.0]])
    (tmp_path / "found").mkdir()
    if kind == "csv":
        pd.DataFrame(points, columns=["x", "y"]).to_csv(tmp_path / "found" / "s1.csv", index=False)
    elif kind == "cell_detection":
        cells = [{"centroid": (p - 0.5).tolist(), "type": 1} for p in points]
        (tmp_path / "found" / "s1_cell_detection.json").write_text(json.dumps({"cells": cells}))
    else:
        content = {"type": "Feature", "geometry": {"type": "MultiPoint", "coordinates": points.tolist()}}
        (tmp_path / "found" / "s1.geojson").write_text(json.dumps(content))
    drawn = TileDataset(index, nuclei=detected_nuclei(index, tmp_path / "found"))[0]["nuclei"][0].numpy()
    rows, columns = np.nonzero(drawn)
    np.testing.assert_allclose([columns.mean() + 0.5 + 16, rows.mean() + 0.5 + 16], points[0], atol=0.2)
    assert len(rows) == pytest.approx(np.pi * 8**2, rel=0.05)  # 4 um at 0.5 um/px


def test_a_map_of_half_the_resolution_and_tiles_of_another_scale(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    (tmp_path / "found").mkdir()
    tifffile.imwrite(tmp_path / "found" / "s1.tif", TRUTH[::2, ::2].astype(np.uint16))
    data = TileDataset(index, size=32, mpp=1.0, nuclei=detected_nuclei(index, tmp_path / "found"))
    np.testing.assert_array_equal(data[0]["nuclei"][0] > 0, TRUTH[16:80:2, 16:80:2] > 0)


def test_files_are_read_once_and_again_when_they_change(tmp_path: Path) -> None:
    index, found = make_index(tmp_path), tmp_path / "found"
    write_format("npy", found)
    detected_nuclei(index, found)
    kept = index / "outlines" / "s1.parquet"
    before = kept.stat().st_mtime_ns
    detected_nuclei(index, found)
    assert kept.stat().st_mtime_ns == before
    np.save(found / "s1.npy", np.where(TRUTH == 1, 1, 0))
    assert len(detected_nuclei(index, found).of("s1")) == 1


def test_the_indexs_own_nuclei(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    table = pd.DataFrame({"x": [40.0], "y": [40.0], "area_um2": [np.pi * 4.5**2], "density": 0.5, "elongation": 1.0})
    NucleusTable(table, {"slide_id": "s1"}).write(nuclei_path(index / "s1.parquet"))
    drawn = TileDataset(index, nuclei=detected_nuclei(index, "index"))[0]["nuclei"][0].numpy() > 0
    wanted = TRUTH[16:80, 16:80] == 1
    assert (drawn & wanted).sum() / (drawn | wanted).sum() > 0.9


def test_pretraining_asks_no_segmenter_and_keeps_touching_nuclei_apart(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    write_format("stardist", tmp_path / "found")

    def asked(images: torch.Tensor, mpp: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nuclei are known")

    data = TileCache(
        TileDataset(index, nuclei=detected_nuclei(index, tmp_path / "found")), tmp_path / "cache", segmenter=asked
    )
    first = collate_tiles(data.__getitems__(list(range(6))))
    again = collate_tiles(data.__getitems__(list(range(6))))  # from the cache
    assert torch.equal(first["nuclei"], again["nuclei"])
    assert torch.equal(first["image"], again["image"])
    ncp = BatchedNCP(keep_radius_um=2.0, retain_prob=0.0)
    views = ViewGenerator(
        TILE, n_local=0, global_scale=(1.0, 1.0), ratio=(1.0, 1.0), ncp=ncp, segmenter=asked, flip=False, turn=False,
        stain_prob=0.0, blur_prob=0.0,
    )  # fmt: skip
    alone = set()
    for seed in range(8):
        made = views(first["image"], MPP, first["nuclei"], torch.Generator().manual_seed(seed))["global"][0][4]
        same = (made - first["image"][4] / 255).abs().amax(0) < 1e-3
        alone.add((bool(same[20:36, 10:22].all()), bool(same[20:36, 22:36].all())))  # the two that touch
    assert alone == {(True, False), (False, True)}
    mixed = MixedDataset([data.dataset, data.dataset])
    assert "nuclei" in mixed[0]
    with pytest.raises(ValueError, match="known of some sources"):
        MixedDataset([data.dataset, TileDataset(index)])
    batch = next(iter(tile_loader(data.dataset, [[(0, 0), (1, 1)]], num_workers=1)))  # through a worker
    assert torch.equal(batch["nuclei"], first["nuclei"][:2])


def test_a_slide_without_nuclei_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = make_index(tmp_path)
    make_index(tmp_path, "s2")
    write_format("npy", tmp_path / "found")
    (tmp_path / "found" / "s2.json").write_text("{")
    data = TileDataset(index, nuclei=detected_nuclei(index, tmp_path / "found"))
    assert data.slide_ids == ["s1"]
    assert "s2.json cannot be read as JSON" in data.skipped["s2"]
    assert "left out" in caplog.text


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


def test_bad_files_are_named(tmp_path: Path) -> None:
    def refused(name: str, content: str | bytes, words: str) -> None:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(InputError, match=words) as caught:
            read_detections(path, (SIDE, SIDE), MPP)
        assert name in str(caught.value)

    refused("a.json", '{"cells": [{"bbox": [1, 2]}]}', "cell 0 has neither")
    refused("b.json", '{"nuc": {}}', "is no GeoJSON")
    refused("c.geojson", '{"type": "Point", "coordinates": ["a"]}', "no list of x, y")
    refused("d.txt", "1,2,3\n", "line 1: no x,y")
    refused("e.csv", "a,b\n1,2\n", "no columns x and y")
    refused("f.csv", "x,y\n1,b\n", "line 2: x and y are '1', 'b'")
    refused("g.png", "no picture", "cannot be read")
    refused("h.tif", "no picture", "cannot be read")
    refused("i.csv", "x,y\n9000,1\n", "lie outside of the slide's 256 x 256")
    np.save(tmp_path / "j.npy", np.array([Bomb()]), allow_pickle=True)
    refused("j.npy", (tmp_path / "j.npy").read_bytes(), "Python objects, which are not opened")
    np.save(tmp_path / "k.npy", np.ones((10, 30), np.int32))
    refused("k.npy", (tmp_path / "k.npy").read_bytes(), "does not fit the slide's 256 x 256")
    index = make_index(tmp_path)
    with pytest.raises(InputError, match=r"nuclei_source .* is no folder"):
        detected_nuclei(index, tmp_path / "absent")
    (tmp_path / "found").mkdir()
    with pytest.raises(InputError, match=r"no slide of .*has no file of nuclei named s1"):
        detected_nuclei(index, tmp_path / "found")
    (tmp_path / "found" / "s1_seg.npy").write_bytes(b"")
    with pytest.raises(InputError, match="is a pickle"):
        detected_nuclei(index, tmp_path / "found")
