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
        with pytest.raises(FeatureError, match="'features' and 'coords'"):
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


def test_a_failed_write_keeps_the_old_file(tmp_path, bag):
    path = write_features(tmp_path / "a.h5", *bag, ATTRS)
    with pytest.raises(TypeError):
        write_features(path, bag[0] + 1, bag[1], {"bad": object()})
    np.testing.assert_array_equal(read_features(path).features, bag[0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
