"""Tiles that TRIDENT and CLAM cut and tissue that others marked, as indexes that embed and train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.synthetic.slides import make_slides
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.index.build import IndexSettings, index_slide
from cytossl_monai.index.imported import TileImporter, import_index, tissue_at
from cytossl_monai.inference.embed import embed_slides, embed_tiles
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.utils.errors import TableError

CONFIG = Path(__file__).parents[2] / "bundles" / "cytossl_pretrain" / "configs" / "import_tiles.json"


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_slides(tmp_path_factory.mktemp("slides"), 1, 1024, seed=1, density=900.0, blur=0.0, progress=False)


def write_coords(path: Path, coords: np.ndarray, **attrs: Any) -> Path:
    """A coordinate file as the two tools write it: ``coords`` with its attributes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", data=coords).attrs.update(attrs)
    return path


PLACES = np.array([[0, 0], [192, 0], [384, 512], [700, 333]], dtype=np.int64)
TRIDENT = {
    "patch_size": 96, "patch_size_level0": 192, "level0_magnification": 40, "target_magnification": 20, "overlap": 0,
    "name": "slide_0000", "savetodir": "x", "level0_width": 1024, "level0_height": 1024,
}  # fmt: skip
CLAM = {"patch_size": 96, "patch_level": 1, "downsample": (2.0, 2.0), "name": "slide_0000", "save_path": "x"}


@pytest.mark.parametrize("attrs", [TRIDENT, CLAM, {"patch_size": 96, "patch_level": 0, "custom_downsample": 2}])
def test_their_patches_are_read_where_they_cut_them(attrs: dict[str, Any], slides: Path, tmp_path: Path) -> None:
    record = read_slide_table(slides)[0]
    index = import_index(record, write_coords(tmp_path / "slide_0000_patches.h5", PLACES, **attrs))
    np.testing.assert_array_equal(index.coords, PLACES)
    assert set(index.table["size"]) == {192}
    assert index.tile_size == 96
    with open_slide(record.path) as slide:
        assert index.mpp == pytest.approx(2 * slide.mpp)
        # A tile is the area that they cut, at their size: what an encoder that gives the mean colour sees.
        encoder = Encoder(torch.nn.AdaptiveAvgPool2d(1), mean=(0.0,) * 3, std=(1.0,) * 3)
        got = embed_tiles(slide, index, encoder)
        for place, colour in zip(PLACES, got):
            region = slide.read_regions(place[None], 192, slide.mpp)[0]
            np.testing.assert_allclose(colour, region.mean(axis=(1, 2)) / 255, atol=0.01)


def test_nuclei_are_counted_as_the_index_counts_them(slides: Path, tmp_path: Path) -> None:
    record = read_slide_table(slides)[0]
    own = index_slide(record, IndexSettings(tile_size=96))
    path = write_coords(tmp_path / "a.h5", own.coords, **TRIDENT)
    imported = import_index(record, path)
    own_counts, counts = own.table["n_nuclei"].to_numpy(), imported.table["n_nuclei"].to_numpy()
    assert np.corrcoef(own_counts, counts)[0, 1] > 0.7  # nuclei on a border count in both tiles here
    assert imported.table["foreground_fraction"].between(0, 1).all()


def test_a_mask_lays_tiles_on_tissue(slides: Path, tmp_path: Path) -> None:
    record = read_slide_table(slides)[0]
    square = [[100, 100], [900, 100], [900, 900], [100, 900], [100, 100]]
    hole = [[300, 300], [700, 300], [700, 700], [300, 700], [300, 300]]
    shape = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [square, hole]}}
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [shape]}))
    picture = np.zeros((64, 64), np.uint8)
    picture[7:56, 7:56] = 255
    picture[19:44, 19:44] = 0
    Image.fromarray(picture).save(tmp_path / "a.png")
    centres = np.array([[200.0, 200.0], [500.0, 500.0], [50.0, 50.0], [800.0, 500.0]])
    for name in ("a.geojson", "a.png"):
        assert tissue_at(tmp_path / name, centres, (1024, 1024)).tolist() == [True, False, False, True]
    index = import_index(record, tissue=tmp_path / "a.geojson", tile_size=64, mpp=0.5)
    middle = index.coords + index.table["size"].iloc[0] / 2
    ring = ((middle > 100) & (middle < 900)).all(axis=1) & ~((middle > 300) & (middle < 700)).all(axis=1)
    assert ring.all()
    grid = np.stack(np.meshgrid(np.arange(0, 1024, 128), np.arange(0, 1024, 128)), -1).reshape(-1, 2) + 64
    wanted = ((grid > 100) & (grid < 900)).all(axis=1) & ~((grid > 300) & (grid < 700)).all(axis=1)
    assert len(index) == wanted.sum()
    both = import_index(record, write_coords(tmp_path / "b.h5", PLACES, **TRIDENT), tmp_path / "a.geojson")
    np.testing.assert_array_equal(both.coords, PLACES[[3]])


def test_the_configuration_imports_and_embeds(slides: Path, tmp_path: Path) -> None:
    write_coords(tmp_path / "patches" / "slide_0000_patches.h5", PLACES, **TRIDENT)
    given = {"slides": str(slides), "coords_dir": str(tmp_path / "patches"), "output_dir": str(tmp_path / "index")}
    workflow = ConfigWorkflow(str(CONFIG), workflow_type="infer", logging_file=False, num_workers=0, **given)
    workflow.initialize()
    with pytest.raises(SystemExit) as stop:
        workflow.run()
    assert stop.value.code == 0
    index = TileIndex.read(tmp_path / "index" / "slide_0000.parquet")
    assert index.meta["imported"]["coords"]["file"].endswith("slide_0000_patches.h5")
    encoder = Encoder(torch.nn.AdaptiveAvgPool2d(1))
    records = read_slide_table(slides)
    report = embed_slides(records, tmp_path / "index", tmp_path / "features", encoder, "mean", progress=False)
    assert [item.status for item in report.items] == ["done"]


@pytest.mark.parametrize(
    ("coords", "attrs", "words"),
    [
        (PLACES, {}, "do not say their patch_size"),
        (PLACES, {"patch_size": 96}, "neither patch_size_level0"),
        (PLACES, {"patch_size": 96, "patch_level": 9}, "was cut at level 9"),
        (PLACES, {**TRIDENT, "level0_width": 2048}, "level0_width 2048, .* has 1024"),
        (PLACES + 1000, TRIDENT, "has tiles outside of"),
        (PLACES[:0], TRIDENT, "not .N, 2. with a tile"),
        (PLACES[:, 0], TRIDENT, "not .N, 2. with a tile"),
    ],
)
def test_coordinates_of_elsewhere_are_named(
    coords: np.ndarray, attrs: dict[str, Any], words: str, slides: Path, tmp_path: Path
) -> None:
    with pytest.raises(TableError, match=words):
        import_index(read_slide_table(slides)[0], write_coords(tmp_path / "a.h5", coords, **attrs))


def test_bad_files_cost_their_slide_alone(slides: Path, tmp_path: Path) -> None:
    record = read_slide_table(slides)[0]
    (tmp_path / "a.h5").write_bytes(b"torn")
    (tmp_path / "a.geojson").write_text('{"features": [{"geometry": {"type": "Point", "coordinates": [1, 2]}}]}')
    (tmp_path / "a.png").write_bytes(b"torn")
    for name, words in (("a.geojson", "holds no polygon"), ("a.png", "cannot be read as a mask")):
        with pytest.raises(TableError, match=words):
            import_index(record, tissue=tmp_path / name)
    with pytest.raises(TableError, match="has no readable 'coords'"):
        import_index(record, tmp_path / "a.h5")
    with pytest.raises(TableError, match="index the slide instead"):
        import_index(record)
    with pytest.raises(TableError, match="--coords_dir"):
        TileImporter(slides, tmp_path)
    with pytest.raises(TableError, match="is no folder"):
        TileImporter(slides, tmp_path, tmp_path / "absent")
    report = TileImporter(slides, tmp_path / "out", tmp_path, num_workers=0, progress=False).run()
    assert report.exit_code == 1  # nothing was done
    assert "no file of slide_0000" in report.items[0].message
