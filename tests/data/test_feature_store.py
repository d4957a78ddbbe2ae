import h5py
import numpy as np
import pytest

from cytossl_monai.data.bags.features import read_feature_attrs, read_features, write_features
from cytossl_monai.utils.errors import FeatureError

ATTRS = {
    "encoder": "0123456789abcdef",
    "patch_size": 224,
    "mpp": 0.5,
    "level0_mpp": 0.25,
    "slide_path": "/slides/a.tif",
    "level0_magnification": None,
}


@pytest.fixture
def bag():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 5)).astype(np.float32), rng.integers(0, 100_000, (7, 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 1e-3)])
def test_round_trip(tmp_path, bag, dtype, tolerance):
    path = write_features(tmp_path / "sub/a.h5", *bag, ATTRS, dtype)
    back = read_features(path, encoder=ATTRS["encoder"])
    assert back.features.dtype == np.float32
    np.testing.assert_allclose(back.features, bag[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(back.coords, bag[1])
    assert back.coords.dtype == np.int64
    assert back.encoder == ATTRS["encoder"]
    assert len(back) == 7
    with h5py.File(path) as file:
        assert file["features"].dtype == dtype
    assert [p.name for p in path.parent.iterdir()] == ["a.h5"]


def test_attributes_lie_where_other_tools_look(tmp_path, bag):
    path = write_features(tmp_path / "a.h5", *bag, ATTRS)
    with h5py.File(path) as file:
        for holder in (file, file["coords"]):
            assert holder.attrs["patch_size"] == 224
            assert holder.attrs["patch_size_level0"] == 448
            assert "level0_magnification" not in holder.attrs
    attrs = read_feature_attrs(path)
    assert attrs["shape"] == (7, 5)
    assert attrs["patch_size_level0"] == 448
    assert attrs["encoder"] == ATTRS["encoder"]


def test_reads_files_of_other_tools(tmp_path, bag):
    path = tmp_path / "clam.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=bag[0][None], maxshape=(1, None, 5), chunks=True)
        file.create_dataset("coords", data=bag[1].astype(np.int32))
        file["coords"].attrs["patch_size"] = 256
        file["coords"].attrs["name"] = np.bytes_(b"slide")
        file["features"].attrs["encoder"] = "uni_v1"
    back = read_features(path)
    np.testing.assert_array_equal(back.features, bag[0])
    np.testing.assert_array_equal(back.coords, bag[1])
    assert back.attrs == {"patch_size": 256, "name": "slide", "encoder": "uni_v1"}


def test_another_encoder(tmp_path, bag):
    path = write_features(tmp_path / "a.h5", *bag, ATTRS)
    with pytest.raises(FeatureError, match=r"made by the encoder 0123456789abcdef, not by ffff"):
        read_features(path, encoder="ffff")
    path = write_features(tmp_path / "b.h5", *bag, {})
    with pytest.raises(FeatureError, match="unknown"):
        read_features(path, encoder="ffff")


def test_what_is_not_written(tmp_path, bag):
    features, coords = bag
    path = tmp_path / "a.h5"
    with pytest.raises(FeatureError, match="empty bag"):
        write_features(path, features[:0], coords[:0], {})
    with pytest.raises(FeatureError, match=r"\(N, D\)"):
        write_features(path, features, coords[:3], {})
    with pytest.raises(FeatureError, match="NaN"):
        write_features(path, np.where(features > 0, np.nan, features), coords, {})
    with pytest.raises(FeatureError, match="float16"):
        write_features(path, features * 1e6, coords, {}, "float16")
    with pytest.raises(FeatureError, match="whole level-0 pixels"):
        write_features(path, features, coords + 0.5, {})
    with pytest.raises(ValueError, match="dtype"):
        write_features(path, features, coords, {}, "int8")
    assert not path.exists()


def test_damaged_files(tmp_path, bag):
    with pytest.raises(FeatureError, match="does not exist"):
        read_features(tmp_path / "none.h5")
    path = write_features(tmp_path / "a.h5", *bag, ATTRS)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FeatureError, match=r"a\.h5"):
        read_features(path)
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(FeatureError, match="damaged"):
        read_feature_attrs(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    for read in (read_features, read_feature_attrs):
        with pytest.raises(FeatureError, match="no dataset 'features'"):
            read(tmp_path / "other.h5")
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((0, 4)), np.zeros((0, 2))
    with pytest.raises(FeatureError, match="empty bag"):
        read_features(tmp_path / "empty.h5")
    with h5py.File(tmp_path / "nan.h5", "w") as file:
        file["features"], file["coords"] = np.full((1, 4), np.nan), np.zeros((1, 2))
    with pytest.raises(FeatureError, match="NaN"):
        read_features(tmp_path / "nan.h5")
    with h5py.File(tmp_path / "shape.h5", "w") as file:
        file["features"], file["coords"] = np.ones((3, 4)), np.zeros((2, 2))
    with pytest.raises(FeatureError, match=r"\(2, 2\)"):
        read_features(tmp_path / "shape.h5")


def put(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


def test_files_of_stamp(tmp_path, bag):
    """As STAMP writes them: feats in half precision, coordinates in micrometres."""
    features, coords = bag
    path = put(tmp_path / "a.h5", feats=features.astype(np.float16), coords=(coords * 0.25).astype(np.float32))
    with h5py.File(path, "a") as file:
        file.attrs.update({"extractor": "uni2", "unit": "um", "tile_size_um": 256.0, "tile_size_px": 224})
    back = read_features(path)
    np.testing.assert_array_equal(back.features, features.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(back.coords, np.rint(coords * 0.25).astype(np.int64))
    told = (back.attrs["level0_mpp"], back.attrs["patch_size_level0"], back.attrs["encoder_name"], back.encoder)
    assert told == (1.0, 256, "uni2", None)
    assert read_feature_attrs(path)["shape"] == features.shape


def test_features_without_coordinates_and_of_a_whole_slide(tmp_path, bag):
    features, _ = bag
    back = read_features(put(tmp_path / "a.h5", features=features))
    assert (back.coords == -1).all()
    assert back.coords.shape == (len(features), 2)
    for shape in ((8,), (1, 8), (1, 1, 8)):
        path = put(tmp_path / "slide.h5", features=np.ones(shape, np.float32))
        assert read_features(path).features.shape == (1, 8)
        assert read_feature_attrs(path)["shape"] == (1, 8)


def test_what_is_no_array_of_numbers(tmp_path, bag):
    features, coords = bag
    other = put(tmp_path / "other.h5", features=features)
    cases = {
        "complex64": put(tmp_path / "complex.h5", features=features.astype(np.complex64), coords=coords),
        "not numbers": put(tmp_path / "text.h5", features=np.array([[b"a"]]), coords=coords[:1]),
        "bool": put(tmp_path / "bool.h5", features=features > 0, coords=coords),
        "no places": put(tmp_path / "places.h5", features=features, coords=coords * np.inf),
        r"the shape \(\)": put(tmp_path / "scalar.h5", features=np.float32(1)),
        r"the shape \(2, 3, 4\)": put(tmp_path / "cube.h5", features=np.ones((2, 3, 4))),
        r"the shape \(3, 0\)": put(tmp_path / "narrow.h5", features=np.ones((3, 0))),
        "link to another file": put(tmp_path / "link.h5", features=h5py.ExternalLink(str(other), "features")),
        "a group": put(tmp_path / "group.h5"),
        "damaged": put(tmp_path / "dangling.h5", features=h5py.SoftLink("/nowhere")),
        "lies in another file": tmp_path / "virtual.h5",
        "declares": tmp_path / "absurd.h5",
    }
    with h5py.File(cases["a group"], "a") as file:
        file.create_group("features")
    with h5py.File(cases["lies in another file"], "w") as file:
        layout = h5py.VirtualLayout(features.shape, np.float32)
        layout[:] = h5py.VirtualSource(other, "features", features.shape)
        file.create_virtual_dataset("features", layout)
    with h5py.File(cases["declares"], "w") as file:
        file.create_dataset("features", (10**9, 1024), np.float32, chunks=(1024, 1024))
    for says, path in cases.items():
        for read in (read_features, read_feature_attrs):
            if says == "no places" and read is read_feature_attrs:
                continue
            with pytest.raises(FeatureError, match=says) as caught:
                read(path)
            assert path.name in str(caught.value)
    with pytest.raises(FeatureError, match="complex"):
        write_features(tmp_path / "x.h5", features + 1j, coords, {})


def test_a_failed_write_keeps_the_old_file(tmp_path, bag):
    path = write_features(tmp_path / "a.h5", *bag, ATTRS)
    with pytest.raises(TypeError):
        write_features(path, bag[0] + 1, bag[1], {"bad": object()})
    np.testing.assert_array_equal(read_features(path).features, bag[0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
