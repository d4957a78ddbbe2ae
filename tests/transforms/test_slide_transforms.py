"""Slides as MONAI transforms: in Compose, PersistentDataset, GridPatchDataset, with workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from monai.data import DataLoader, Dataset, GridPatchDataset, MetaTensor, PersistentDataset, set_track_meta
from monai.transforms import Compose

from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.transforms import NucleiCenteredPerturbd, SegmentNuclei, SegmentNucleid
from cytossl_monai.transforms.kernels.checks import stated_mpp
from cytossl_monai.transforms.tiling.array import LoadSlide, LoadTile, TileSlide, tile_affine
from cytossl_monai.transforms.tiling.dictionary import IterateTiles, LoadSlided, LoadTiled, TileSlided

WIDTH, HEIGHT = 900, 600
DOTS = [(130, 140), (450, 420), (700, 80)]


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Glass with three dark discs of 8 um, the size of a nucleus, at 0.25 um/px."""
    image = np.full((HEIGHT, WIDTH, 3), (238, 240, 236), np.uint8)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for x, y in DOTS:
        image[(rows - y) ** 2 + (columns - x) ** 2 < 16**2] = (80, 60, 120)
    path = tmp_path_factory.mktemp("transforms") / "slide.tif"
    tifffile.imwrite(
        path,
        image,
        tile=(128, 128),
        photometric="rgb",
        compression="deflate",
        resolution=(4e4, 4e4),
        resolutionunit="CENTIMETER",
    )
    return path


def test_grid_covers_the_slide_without_overlap(slide_file: Path) -> None:
    with LoadSlide()(slide_file) as slide:
        items = TileSlide(100, mpp=0.5)(slide)
    covered = np.zeros((HEIGHT, WIDTH), int)
    for item in items:
        covered[item["y"] : item["y"] + 200, item["x"] : item["x"] + 200] += 1
    assert covered.min() == covered.max() == 1
    with LoadSlide()(slide_file) as slide:
        whole = TileSlide(100, mpp=0.5, partial=False)(slide)
        halved = TileSlide(100, mpp=0.5, overlap=0.5)(slide)
    assert all(item["x"] + 200 <= WIDTH and item["y"] + 200 <= HEIGHT for item in whole)
    assert len({item["x"] for item in halved}) > len({item["x"] for item in items})


def test_nuclei_mode_keeps_the_tiles_with_nuclei(slide_file: Path) -> None:
    with LoadSlide()(slide_file) as slide:
        items = TileSlide(50, mpp=0.5, mode="nuclei")(slide)
    kept = {(item["x"], item["y"]) for item in items}
    wanted = {(x // 100 * 100, y // 100 * 100) for x, y in DOTS}
    assert wanted <= kept
    assert len(kept) <= 9, "blank glass was kept"


def test_compose_gives_tiles_that_know_where_they_lie(slide_file: Path) -> None:
    tiles = Compose([LoadSlide(), TileSlide(100, mpp=0.5), LoadTile()])(str(slide_file))
    assert all(isinstance(tile, MetaTensor) and tile.shape == (3, 100, 100) for tile in tiles)
    assert {tile.dtype for tile in tiles} == {torch.uint8}
    tile = next(t for t in tiles if (t.meta["x"], t.meta["y"]) == (400, 400))
    assert tile.meta["mpp"] == 0.5
    assert tile.meta["level"] == 0
    assert all((t.meta["y"], t.meta["x"]) == tuple(t.meta["location"]) for t in tiles), "MONAI has (row, column)"
    with open_slide(slide_file) as slide:
        np.testing.assert_array_equal(tile.numpy(), slide.read_region(400, 400, 100, 0.5))
    # The darkest pixel's place by the affine is the place of the disc, in micrometres.
    dark = (tile.float().mean(0) < 150).nonzero().float().mean(0)
    place = tile.affine @ torch.tensor([*dark.tolist(), 0.0, 1.0], dtype=torch.float64)
    np.testing.assert_allclose(place[:2], np.array([420, 450]) * 0.25, atol=0.3)


@pytest.mark.parametrize("track_meta", [True, False])
def test_lengths_are_the_tiles_not_the_slides(slide_file: Path, track_meta: bool) -> None:
    """The sample's ``mpp`` is the slide's, 0.25; the tiles are cut at 0.5."""
    seen = []
    nuclei = SegmentNucleid("image", mask_keys="nuclei")
    perturb = NucleiCenteredPerturbd("image", {"noise": 1.0}, "nuclei", margin_um=4.0)
    steps = [LoadSlided("image"), TileSlided("image", tile_size=96, mpp=0.5), LoadTiled("image"), nuclei, perturb]
    set_track_meta(track_meta)
    try:
        out = Compose(steps)({"image": str(slide_file), "mpp": 0.25})
        assert all(item["mpp"] == 0.5 and item["slide_mpp"] == 0.25 for item in out)
        for item in Compose(steps[:3])({"image": str(slide_file), "mpp": 0.25}):
            expected = SegmentNuclei(mpp=0.5)(item["image"])
            assert torch.equal(torch.as_tensor(nuclei(item)["nuclei"]), torch.as_tensor(expected))
            kept = {**item, "nuclei": expected}
            again = NucleiCenteredPerturbd("image", {"noise": 1.0}, "nuclei", mpp=0.5, margin_um=4.0)(kept)
            assert torch.equal(torch.as_tensor(perturb(kept)["image"]), torch.as_tensor(again["image"]))
            seen.append(float(torch.as_tensor(expected).sum()))
    finally:
        set_track_meta(True)
    assert max(seen) > 0


@pytest.mark.parametrize(
    ("argument", "own", "item", "expected"),
    [(0.1, 0.2, 0.3, 0.1), (None, 0.2, 0.3, 0.2), (None, None, 0.3, 0.3), (0.1, None, None, 0.1), (None, 0.2, "", 0.2)],
)
def test_one_order_for_the_resolution(argument: Any, own: Any, item: Any, expected: float) -> None:
    image = MetaTensor(torch.zeros(3, 4, 4), meta={} if own is None else {"mpp": own})
    assert stated_mpp(argument, image, item) == expected
    assert stated_mpp(None, torch.zeros(3, 4, 4), "") is None


def test_affine_agrees_between_resolutions() -> None:
    """The same spot of the slide has the same micrometres, whatever the resolution of the tile."""
    fine, coarse = tile_affine(400, 100, 0.25, 0.25), tile_affine(400, 100, 0.25, 1.0)
    a = fine @ torch.tensor([5.5, 9.5, 0, 1], dtype=torch.float64)
    b = coarse @ torch.tensor([1.0, 2.0, 0, 1], dtype=torch.float64)
    np.testing.assert_allclose(a, b)


def test_dictionary_versions_keep_the_item(slide_file: Path) -> None:
    chain = Compose([LoadSlided("image"), TileSlided("image", tile_size=100, mpp=0.5), LoadTiled("image")])
    tiles = chain({"image": str(slide_file), "label": 1})
    assert len(tiles) == 15
    assert all(tile["label"] == 1 and isinstance(tile["image"], MetaTensor) for tile in tiles)
    finer = chain({"image": str(slide_file), "mpp": 0.5})
    assert len(finer) == 9 * 6, "the mpp of the item overrides the file's"
    with pytest.raises(ValueError, match="one key"):
        TileSlided(["a", "b"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_persistent_dataset_and_workers(slide_file: Path, tmp_path: Path, context: str) -> None:
    with open_slide(slide_file) as slide:
        items = TileSlide(100, mpp=0.5)(slide)
    here = torch.stack([LoadTile()(item).as_tensor() for item in items])
    cached = PersistentDataset(items, LoadTile(), cache_dir=tmp_path)
    for _ in range(2):
        loader = DataLoader(cached, batch_size=5, num_workers=1, multiprocessing_context=context)
        assert torch.equal(torch.cat([torch.as_tensor(batch) for batch in loader]), here)
        if context == "spawn":
            break
    assert len(list(tmp_path.glob("*.pt"))) == len(items)


def test_dataset_of_items_shares_one_pool(slide_file: Path) -> None:
    with open_slide(slide_file) as slide:
        items = [{"tile": item} for item in TileSlide(100, mpp=0.5)(slide)]
    transform = LoadTiled("tile", max_open=1)
    assert len([item for item in Dataset(items, transform)]) == 15  # noqa: C416 - iterates by __getitem__
    assert len(transform.loader.pool) == 1


def test_grid_patch_dataset(slide_file: Path) -> None:
    data = GridPatchDataset([{"image": str(slide_file)}], IterateTiles("image", tile_size=100, mpp=0.5))
    tiles = list(data)
    assert len(tiles) == 15
    item, coords = tiles[1]
    assert (item["image"].meta["x"], item["image"].meta["y"]) == (coords[0, 0], coords[1, 0])
