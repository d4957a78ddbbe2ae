"""Maps of tile values: laid out as a naive loop does, and read back by other libraries in the slide's frame."""

import json

import jsonschema
import nibabel
import numpy as np
import pytest
from monai.transforms import LoadImage

from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.visualize.geojson import feature_collection, write_geojson
from cytossl_monai.visualize.heatmap import colours, display_scale, on_white, tile_map, write_heatmap_tiff
from cytossl_monai.visualize.nifti import write_nifti

CELL, WIDTH, HEIGHT, MPP = 448, 5000, 3300, 0.25


@pytest.fixture
def tiles(rng):
    places = rng.permutation(11 * 7)[:40]
    return np.stack([places % 11, places // 11], 1) * CELL, rng.random(40)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def heat(tiles):
    return tile_map(*tiles, CELL, WIDTH, HEIGHT, MPP)


def test_tile_map_is_the_naive_one(tiles, heat):
    coords, values = tiles
    wanted = np.full((8, 12), np.nan, np.float32)
    for (x, y), value in zip(coords, values):
        wanted[y // CELL, x // CELL] = value
    np.testing.assert_array_equal(heat.values, wanted)


def test_the_largest_value_of_a_cell_stays():
    coords = np.array([[0, 0], [10, 10], [9000, 9000]])  # the last hangs over the slide's edge
    heat = tile_map(coords, np.array([0.7, 0.2, 0.4]), 100, 500, 500, MPP)
    assert heat.values[0, 0] == np.float32(0.7)
    assert heat.values[-1, -1] == np.float32(0.4)
    assert np.isnan(heat.values).sum() == 23
    assert np.isnan(tile_map(np.empty((0, 2), int), np.empty(0), 100, 500, 500, MPP).values).all()


@pytest.mark.parametrize("backend", ["auto", "openslide", "tifffile"])
def test_heatmap_tiff_opens_as_a_slide_in_the_slides_frame(tmp_path, heat, backend):
    path = write_heatmap_tiff(tmp_path / "heatmap.tif", heat, downsample=4)
    slide = open_slide(path, backend=backend)
    assert slide.mpp == pytest.approx(4 * MPP, rel=1e-3)
    assert slide.width * slide.mpp == pytest.approx(WIDTH * MPP, rel=2e-3)
    assert len(slide.level_dimensions) > 1
    assert max(slide.level_dimensions[-1]) <= 256
    for row, column in np.argwhere(np.isfinite(heat.values)):
        # The centre of each tile, at the resolution of the second level.
        x, y = (column + 0.5) * CELL / 4, (row + 0.5) * CELL / 4
        if x < slide.width - 4 and y < slide.height - 4:
            seen = slide.read_region(round(x), round(y), 1, 8 * MPP)[:, 0, 0]
            np.testing.assert_allclose(seen, on_white(heat.values[row, column]), atol=1)
    row, column = np.argwhere(np.isnan(heat.values))[0]
    assert (
        slide.read_region(int((column + 0.5) * CELL / 4), int((row + 0.5) * CELL / 4), 1).ravel().tolist() == [255] * 3
    )


def test_heatmap_tiff_stays_small_whatever_the_slide(tmp_path):
    heat = tile_map(np.array([[0, 0]]), np.ones(1), 448, 200_000, 90_000, MPP)
    slide = open_slide(write_heatmap_tiff(tmp_path / "heatmap.tif", heat), backend="tifffile")
    assert max(slide.width, slide.height) <= 4096
    assert slide.width * slide.mpp == pytest.approx(200_000 * MPP, rel=1e-2)


def test_nifti_lies_in_the_slides_frame(tmp_path, heat):
    path = write_nifti(tmp_path / "heatmap.nii.gz", heat)
    image = nibabel.load(path)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header.get_zooms()[:2] == pytest.approx((CELL * MPP / 1000,) * 2)
    values = image.get_fdata()[..., 0]
    np.testing.assert_allclose(values, np.nan_to_num(heat.values.T, nan=-1), atol=1e-6)
    # ITK's axes are x to the right and y down, as a slide's: the first voxel's centre is half a cell from the corner.
    seen = LoadImage(reader="NibabelReader", image_only=True)(path)
    assert np.abs(np.asarray(seen.affine)[:2, 3]) == pytest.approx([CELL * MPP / 2000] * 2)
    again = LoadImage(reader="ITKReader", image_only=True)(path)
    np.testing.assert_allclose(np.asarray(again).squeeze(), values, atol=1e-6)
    np.testing.assert_allclose(np.asarray(again.affine), np.asarray(seen.affine), atol=1e-6)


def test_geojson_is_what_qupath_reads(tmp_path, tiles, request):
    coords, values = tiles
    order = np.argsort(-values)
    collection = feature_collection("s", coords, CELL, values, {"Attention": values, "Nuclei": values * 9}, order[:3])
    path = write_geojson(tmp_path / "tiles.geojson", collection)
    told = json.loads(path.read_text(encoding="utf-8"))
    schema = json.loads((request.path.parent / "qupath_schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(told)
    assert len({feature["id"] for feature in told["features"]}) == len(told["features"]) == 43
    top = [f for f in told["features"] if f["properties"]["objectType"] == "annotation"]
    assert [f["properties"]["name"] for f in top] == ["Top 1", "Top 2", "Top 3"]
    for feature, i in zip(top, order):
        ring = np.array(feature["geometry"]["coordinates"][0])
        assert (ring[0] == ring[-1]).all()
        assert ring.min(0).tolist() == coords[i].tolist()
        assert ring.max(0).tolist() == (coords[i] + CELL).tolist()
        assert feature["properties"]["measurements"]["Attention"] == values[i]
    again = feature_collection("s", coords, CELL, values, {}, order[:3])
    assert [f["id"] for f in again["features"]] == [f["id"] for f in told["features"]]  # importing twice replaces


def test_schema_refuses_what_qupath_would_not_read(tiles, request):
    schema = json.loads((request.path.parent / "qupath_schema.json").read_text())
    good = feature_collection("s", tiles[0][:1], CELL, tiles[1][:1], {}, np.empty(0, int))
    for key, value in (("objectType", "square"), ("measurements", {"a": "high"}), ("classification", {"color": 1})):
        bad = json.loads(json.dumps(good))
        bad["features"][0]["properties"][key] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema).validate(bad)


def test_display_scale_and_colours():
    values = np.array([0, 1e-6, 1e-4, 1e-2])
    shown = display_scale(values)
    assert (np.diff(shown) > 0).all()
    assert shown.max() == 1
    assert shown.min() == 0
    assert display_scale(np.zeros(3)).tolist() == [0, 0, 0]
    ramp = colours(np.linspace(0, 1, 64)).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(ramp) > 0).all()  # brightness rises all the way: readable in grey and to the colour-blind
    assert on_white(np.array([np.nan])).tolist() == [[255, 255, 255]]
