"""Tiles and images in, batches out: against pixels written by the test itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

from cytossl_monai.data.tiles.dataset import MixedDataset, TileDataset, collate_tiles
from cytossl_monai.data.tiles.images import ImageFolder, ImageRecord, cut_field, fit_square, list_images
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.data.tiles.loader import choose_workers, tile_loader
from cytossl_monai.data.tiles.sampler import SSLBatchSampler
from cytossl_monai.utils.errors import InputError, SlideError, TableError
from cytossl_monai.utils.files import file_fingerprint

SIDE, TILE, MPP = 512, 32, 0.25


def write_slide(folder: Path, name: str, seed: int, n_tiles: int) -> np.ndarray:
    """A lossless slide of smooth noise and an index of ``n_tiles`` tiles of 32 px at native scale; gives the pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (SIDE // 16, SIDE // 16, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    path = folder / f"{name}.tif"
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb", resolution=(1e4 / MPP, 1e4 / MPP), resolutionunit="CENTIMETER"
    )
    table = pd.DataFrame(
        {
            "slide_id": name,
            "x": rng.integers(0, SIDE - TILE, n_tiles),
            "y": rng.integers(0, SIDE - TILE, n_tiles),
            "size": TILE,
            "level": 0,
            "mpp": MPP,
            "n_nuclei": np.arange(n_tiles) % 5,
            "nuclei_fraction": 0.1,
            "foreground_fraction": 0.5,
            "sharpness": 1.0,
        }
    )
    meta = {
        "slide_id": name,
        "slide_path": str(path),
        "level0_mpp": MPP,
        "settings": {"tile_size": TILE, "mpp": MPP},
    }
    (folder / "index").mkdir(exist_ok=True)
    TileIndex(table, meta).write(folder / "index" / f"{name}.parquet")
    return pixels


@pytest.fixture
def slides(tmp_path: Path) -> dict[str, np.ndarray]:
    return {
        name: write_slide(tmp_path, name, seed, n) for seed, (name, n) in enumerate({"a": 12, "b": 5, "c": 9}.items())
    }


def test_tiles_are_the_slides_pixels(tmp_path: Path, slides: dict[str, np.ndarray]) -> None:
    data = TileDataset(tmp_path / "index")
    assert len(data) == 26
    items = data.__getitems__([(n, 100 + n) for n in (25, 0, 3, 14, 20, 1)])
    assert [item["sample"] for item in items] == [125, 100, 103, 114, 120, 101]
    assert [item["slide_id"] for item in items] == ["c", "a", "a", "b", "c", "a"]
    for item in items:
        x, y = item["x"], item["y"]
        expected = slides[item["slide_id"]][y : y + TILE, x : x + TILE].transpose(2, 0, 1)
        np.testing.assert_array_equal(item["image"].numpy(), expected)
    np.testing.assert_array_equal(data[7]["image"], data.__getitems__([7])[0]["image"])


def test_one_batched_call_a_slide(
    tmp_path: Path, slides: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cytossl_monai.data.slides.slide import Slide

    calls: list[int] = []
    read = Slide.read_regions

    def counted(self: Slide, locations: np.ndarray, *args: object, **kwargs: object) -> object:
        calls.append(len(locations))
        return read(self, locations, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Slide, "read_regions", counted)
    data = TileDataset(tmp_path / "index", max_open=2)
    data.__getitems__([0, 13, 20, 1, 14, 2])
    assert sorted(calls) == [1, 2, 3]
    assert len(data.pool) <= 2


def test_another_scale_keeps_the_centre(tmp_path: Path, slides: dict[str, np.ndarray]) -> None:
    native, wide = TileDataset(tmp_path / "index"), TileDataset(tmp_path / "index", size=16, mpp=2 * MPP, min_nuclei=1)
    same_place = TileDataset(tmp_path / "index", size=64)
    x, y = native[1]["x"], native[1]["y"]
    assert (wide[0]["x"], wide[0]["y"]) == (x, y)  # 16 px at twice the scale cover what 32 px did
    assert (same_place[1]["x"], same_place[1]["y"]) == (x - 16, y - 16)
    if 16 <= x < SIDE - 64 and 16 <= y < SIDE - 64:
        np.testing.assert_array_equal(same_place[1]["image"][:, 16:48, 16:48], native[1]["image"])
    averaged = native[1]["image"].float().reshape(3, 16, 2, 16, 2).mean((2, 4))
    assert (wide[0]["image"].float() - averaged).abs().max() <= 3
    assert float(wide[0]["mpp"]) == 2 * MPP


def test_weights_and_choice_of_tiles(tmp_path: Path, slides: dict[str, np.ndarray]) -> None:
    data = TileDataset(tmp_path / "index", slide_ids=["a"], weight_power=1.0)
    np.testing.assert_array_equal(data.weights, 1 + np.arange(12) % 5)
    assert TileDataset(tmp_path / "index", weight_column=None).weights is None
    assert len(TileDataset(tmp_path / "index", min_nuclei=1)) == 9 + 4 + 7
    with pytest.raises(TableError, match="zzz"):
        TileDataset(tmp_path / "index", slide_ids=["zzz"])
    with pytest.raises(TableError, match="no column 'colour'"):
        TileDataset(tmp_path / "index", weight_column="colour")


def test_a_missing_slide_is_left_out_and_named(
    tmp_path: Path, slides: dict[str, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "b.tif").unlink()
    data = TileDataset(tmp_path / "index")
    assert data.slide_ids == ["a", "c"]
    assert list(data.skipped) == ["b"]
    assert "b.tif is gone" in caplog.text
    with pytest.raises(SlideError, match=r"b\.tif is gone"):
        TileDataset(tmp_path / "index", on_missing="raise")
    for name in ("a", "c"):
        (tmp_path / f"{name}.tif").unlink()
    with pytest.raises(TableError, match="no tile to train on"):
        TileDataset(tmp_path / "index")
    with pytest.raises(TableError, match=r"index\.json"):
        TileDataset(tmp_path / "nothing")


def test_a_slide_that_breaks_later_is_named(tmp_path: Path, slides: dict[str, np.ndarray]) -> None:
    data = TileDataset(tmp_path / "index")
    (tmp_path / "a.tif").write_bytes(b"II*\0 truncated")
    with pytest.raises(SlideError, match="slide a"):
        data.__getitems__([0])


def test_moved_slides_are_found(tmp_path: Path, slides: dict[str, np.ndarray]) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in slides:
        (tmp_path / f"{name}.tif").rename(moved / f"{name}.tif")
    assert len(TileDataset(tmp_path / "index", slide_root=moved)) == 26


def test_moved_slides_of_one_name_are_told_apart(tmp_path: Path, slides: dict[str, np.ndarray]) -> None:
    for name in slides:
        path = tmp_path / "index" / f"{name}.parquet"
        index = TileIndex.read(path)
        old = Path("/old/cohort") / name / "scan.tif"
        TileIndex(index.table, {**index.meta, "slide_path": str(old)}).write(path)
        place = tmp_path / "kept" / name
        place.mkdir(parents=True)
        (place / "scan.tif").write_bytes((tmp_path / f"{name}.tif").read_bytes())
    data = TileDataset(tmp_path / "index", slide_root=tmp_path / "kept")
    assert [path.parent.name for path in data.slide_paths] == sorted(slides)
    (tmp_path / "scan.tif").write_bytes((tmp_path / "a.tif").read_bytes())
    with pytest.raises(TableError, match=r"scan\.tif would be both slide a and slide b|changed|no tile to train on"):
        TileDataset(tmp_path / "index", slide_root=tmp_path)


def test_a_slide_that_changed_since_its_index_is_left_out(tmp_path: Path, slides: dict[str, np.ndarray]) -> None:
    path = tmp_path / "index" / "a.parquet"
    index = TileIndex.read(path)
    slide = tmp_path / "a.tif"
    meta = {**index.meta, "fingerprint": file_fingerprint(slide), "slide_size": slide.stat().st_size, "slide_mtime": 0}
    TileIndex(index.table, meta).write(path)
    whole = len(TileDataset(tmp_path / "index"))  # another time, the same content: a copy
    slide.write_bytes(slide.read_bytes() + b"x")
    data = TileDataset(tmp_path / "index")
    assert len(data) == whole - len(index)
    assert "a.tif has changed since it was indexed" in data.skipped["a"]
    with pytest.raises(SlideError, match="has changed"):
        TileDataset(tmp_path / "index", on_missing="raise")


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_this_process_reads(tmp_path: Path, slides: dict[str, np.ndarray], context: str) -> None:
    data = TileDataset(tmp_path / "index")
    data[0]  # a handle is open when the workers start
    batches = []
    for workers in (0, 1):
        sampler = SSLBatchSampler(data, 6, seed=1)
        stream = iter(tile_loader(data, sampler, num_workers=workers, context=context if workers else None))
        batches.append([next(stream) for _ in range(3)])
    for here, there in zip(*batches):
        assert here["image"].dtype == torch.uint8
        assert here["image"].shape == (6, 3, TILE, TILE)
        for key in ("image", "mpp", "x", "y", "sample"):
            assert torch.equal(here[key], there[key])
        assert here["slide_id"] == there["slide_id"]


def test_random_transforms_follow_the_sample_not_the_worker(tmp_path: Path, slides: dict[str, np.ndarray]) -> None:
    from monai.transforms import Compose, RandGaussianNoised

    transform = Compose([RandGaussianNoised(keys="image", prob=1.0, std=9.0)])
    data = TileDataset(tmp_path / "index", transform=transform)
    first, other, again = (data.__getitems__([(3, sample)])[0]["image"] for sample in (5, 6, 5))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


# -- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label, count in (("x", 3), ("y", 2)):
        (tmp_path / "cells" / label).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 255, (40 + number, 30, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "cells" / label / f"{number}.png")
    return tmp_path / "cells"


def test_folder_of_classes(images: Path) -> None:
    data = ImageFolder(images, size=24, mpp=0.25)
    assert data.labels == ["x", "x", "x", "y", "y"]
    item = data[0]
    assert item["image"].shape == (3, 24, 24)
    assert float(item["mpp"]) == pytest.approx(0.25 * 40 / 24)
    assert np.bincount(data.groups).tolist() == [3, 2]


def test_a_square_holds_the_image_in_its_middle() -> None:
    image = np.random.default_rng(0).integers(0, 255, (10, 4, 3)).astype(np.uint8)
    np.testing.assert_array_equal(fit_square(image, 10)[:, 3:7], image)
    np.testing.assert_array_equal(fit_square(image, 10), np.pad(image, ((0, 0), (3, 3), (0, 0)), "symmetric"))


@pytest.mark.parametrize("fill", ["reflect", "glass"])
@pytest.mark.parametrize(("x", "y", "side"), [(8, 6, 6), (8, 6, 40), (0, 0, 10), (15.5, 11.5, 7), (3, 9, 100)])
def test_a_field_is_centred_and_says_what_is_real(x: float, y: float, side: int, fill: str, tmp_path: Path) -> None:
    """Against an image that is padded far on all sides before it is cut."""
    image = np.random.default_rng(2).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    far = 120
    if fill == "reflect":
        padded = np.pad(image, ((far, far), (far, far), (0, 0)), "symmetric")
    else:
        padded = np.empty((12 + 2 * far, 16 + 2 * far, 3), np.uint8)
        padded[:] = np.percentile(image.reshape(-1, 3), 95, axis=0).astype(np.uint8)
        padded[far : far + 12, far : far + 16] = image
    left, top = (int(np.floor(place - side / 2 + 0.5)) for place in (x, y))
    square = cut_field(image, x, y, side, fill)
    np.testing.assert_array_equal(square, padded[far + top : far + top + side, far + left : far + left + side])
    inside = np.zeros_like(padded[..., 0])
    inside[far : far + 12, far : far + 16] = 1
    rows, columns = np.nonzero(inside[far + top : far + top + side, far + left : far + left + side])
    record = ImageRecord(tmp_path / "a.png", x=x, y=y)
    Image.fromarray(image).save(record.path)
    for size in (side, 2 * side):
        valid = ImageFolder([record], size=size, crop=side)[0]["valid"] * (side / size)
        assert valid.tolist() == pytest.approx([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_items_say_where_their_real_pixels_lie(images: Path) -> None:
    item = ImageFolder(images, size=20, mpp=0.25)[0]  # 30 x 40 px in a square of 40
    assert item["valid"].tolist() == [2.5, 0.0, 17.5, 20.0]
    tall = ImageFolder(images, size=64, mpp=0.25, fit="tile")
    assert tall[0]["valid"].tolist() == [17.0, 12.0, 47.0, 52.0]
    assert tall.tile_um() == pytest.approx(0.25 * np.sqrt(30 * 41))
    with pytest.raises(ValueError, match="fill must be"):
        ImageFolder(images, fill="flat")


def test_a_place_outside_of_its_image_is_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("image,label,x,y\ncells/x/0.png,a,31,20\n")
    with pytest.raises(InputError, match=r"0\.png: the place \(31, 20\) lies outside of its 30 x 40 px"):
        ImageFolder(tmp_path / "out.csv", size=16, crop=16)[0]


def test_a_table_without_groups_is_grouped_by_image(tmp_path: Path, images: Path) -> None:
    """Never by label: the cells of one frame would stand on both sides of a fold."""
    (tmp_path / "cells.csv").write_text(
        "image,label,x,y\ncells/x/0.png,a,5,5\ncells/x/0.png,b,9,9\ncells/y/0.png,a,5,5\n"
    )
    groups = [record.group for record in list_images(tmp_path / "cells.csv")]
    assert groups[0] == groups[1] != groups[2]


def test_tables_and_datalists(images: Path, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(
        "image,class,x,y,group\ncells/x/0.png,NILM,15,20,p1\ncells/y/1.png,HSIL,15,20,p2\n"
    )
    records = list_images(tmp_path / "table.csv")
    assert [(r.label, r.group, r.x) for r in records] == [("NILM", "p1", 15.0), ("HSIL", "p2", 15.0)]
    data = ImageFolder(tmp_path / "table.csv", size=16, crop=16, mpp=0.5)
    pixels = np.asarray(Image.open(images / "x" / "0.png"))[12:28, 7:23]
    np.testing.assert_array_equal(data[0]["image"].numpy().transpose(1, 2, 0), pixels)
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "cells/x/0.png", "label": 3}]}))
    assert list_images(tmp_path / "list.json")[0].label == "3"
    with pytest.raises(TableError, match="no image under 'test'"):
        list_images(tmp_path / "list.json", key="test")
    (tmp_path / "bad.csv").write_text("file\nx.png\n")
    with pytest.raises(TableError, match="entry 1: no 'image'"):
        list_images(tmp_path / "bad.csv")
    with pytest.raises(TableError, match="does not exist"):
        list_images(tmp_path / "none.csv")


def test_frames_become_tiles_that_cover_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (70, 100, 3)).astype(np.uint8)
    (tmp_path / "frames").mkdir()
    Image.fromarray(pixels).save(tmp_path / "frames" / "f.png")
    data = ImageFolder(tmp_path / "frames", size=32, mpp=0.5, fit="tile")
    covered = np.zeros((70, 100), bool)
    for item, record in zip((data[n] for n in range(len(data))), data.records):
        left, top = round(record.x - 16), round(record.y - 16)
        np.testing.assert_array_equal(
            item["image"].numpy().transpose(1, 2, 0), pixels[top : top + 32, left : left + 32]
        )
        covered[top : top + 32, left : left + 32] = True
        assert float(item["mpp"]) == 0.5
    assert covered.all()


def test_broken_images_are_named(images: Path) -> None:
    (images / "x" / "0.png").write_bytes(b"not a png")
    with pytest.raises(InputError, match=r"0\.png cannot be read"):
        ImageFolder(images, size=16)[0]


def test_mixed_sources(tmp_path: Path, slides: dict[str, np.ndarray], images: Path) -> None:
    tiles, cells = TileDataset(tmp_path / "index"), ImageFolder(images, size=TILE)
    mixed = MixedDataset([tiles, cells], shares=[1, 3])
    assert len(mixed) == 31
    batch = collate_tiles(mixed.__getitems__([(0, 7), (26, 8), (30, 9), (13, 10)]))
    assert torch.equal(batch["image"][1], cells[0]["image"])
    assert torch.equal(batch["image"][3], tiles[13]["image"])
    assert batch["sample"].tolist() == [7, 8, 9, 10]
    sampler = SSLBatchSampler(mixed, 8)
    assert sum(item >= 26 for item, _ in sampler.batch(0)) == 6
    with pytest.raises(ValueError, match="shares"):
        MixedDataset([tiles], shares=[0])


def test_what_items_are_is_said_where_they_are_alike(tmp_path: Path, slides: dict[str, np.ndarray]) -> None:
    del slides
    tiles = TileDataset(tmp_path / "index")
    assert tiles.tile is not None
    side, mpp = tiles.tile
    alike = [ImageRecord(Path("frame.png"), x=50.0, y=50.0)]
    cells = ImageFolder(alike, size=side, mpp=mpp / 2, crop=2 * side)
    assert cells.tile == (side, pytest.approx(mpp))
    assert MixedDataset([tiles, cells]).tile == tiles.tile
    assert MixedDataset([tiles, ImageFolder(alike, size=side, mpp=mpp, crop=2 * side)]).tile is None
    whole = ImageFolder([ImageRecord(Path("frame.png"))], size=side, mpp=mpp)
    assert whole.tile is None
    assert MixedDataset([whole, whole]).tile is None


def test_workers_for_a_machine() -> None:
    assert choose_workers(2, 1) == 1
    assert choose_workers(2, 2) == 1
    assert choose_workers(16, 2) == 7
    assert choose_workers(128, 1) == 16
