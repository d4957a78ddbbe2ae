"""Attributes of feature files as other tools and damaged files have them: read as plain values, or told by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cytossl_monai.data.bags.exchange import FeatureExporter
from cytossl_monai.data.bags.features import read_feature_attrs, read_features, write_features
from cytossl_monai.data.bags.items import bag_encoder
from cytossl_monai.utils.errors import FeatureError

ATTRS = {"encoder": "0123456789abcdef", "patch_size": 224, "mpp": 0.5, "level0_mpp": 0.25, "scales": 1}


def bag(path: Path, **attrs: Any) -> Path:
    write_features(path, np.ones((2, 3), np.float32), np.zeros((2, 2), np.int64), ATTRS)
    with h5py.File(path, "r+") as file:
        file.attrs.update(attrs)
    return path


@pytest.mark.parametrize(
    ("attrs", "says"),
    [
        ({"scales": "two"}, "attribute scales is two, no number from 1 to"),
        ({"scales": np.nan}, "attribute scales is nan, no number"),
        ({"encoder": [1, 2]}, r"attribute encoder is \[1 2\], not one text"),
        ({"encoder_name": ["a", "b"]}, "attribute encoder_name is .*, not one text"),
        ({"level0_mpp": 0.0}, "attribute level0_mpp is 0.0, no number from 1e-06 to"),
        ({"patch_size": 0}, "attribute patch_size is 0, no number from 1 to"),
        ({"patch_size_level0": 1e300}, "attribute patch_size_level0 is 1e.300, no number"),
        ({"overlap": [1, 2]}, "attribute overlap is .*, no number from 0"),
    ],
)
def test_an_odd_attribute_is_told_with_its_file(tmp_path: Path, attrs: dict[str, Any], says: str) -> None:
    path = bag(tmp_path / "odd.h5", **attrs)
    for read in (read_features, read_feature_attrs, lambda path: bag_encoder([{"features": str(path)}])):
        with pytest.raises(FeatureError, match=says) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "correct the attribute or make the file again" in str(caught.value)


def test_a_tile_size_of_stamp_that_is_none(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "stamp.h5", "w") as file:
        file["feats"], file["coords"] = np.ones((2, 3)), np.zeros((2, 2))
        file.attrs["tile_size_um"] = "n/a"
    with pytest.raises(FeatureError, match=r"stamp\.h5: attribute tile_size_um is n/a, no number"):
        read_features(tmp_path / "stamp.h5")


def test_what_means_a_number_or_nothing_is_read(tmp_path: Path) -> None:
    path = bag(
        tmp_path / "a.h5", scales=np.array([2]), patch_size="224", encoder=7, overlap=h5py.Empty("f4"), other="x"
    )
    attrs = read_feature_attrs(path)
    assert (attrs["scales"], attrs["patch_size"], attrs["encoder"], attrs["other"]) == (2, 224, "7", "x")
    assert "overlap" not in attrs
    assert bag_encoder([{"features": str(path)}])["scales"] == 2


def test_text_that_is_not_utf8_can_be_written_again(tmp_path: Path) -> None:
    """HDF5 calls text UTF-8 without looking; the export names its report by this slide_id."""
    path = bag(tmp_path / "in" / "a.h5", level0_mpp=b"\xfc", slide_id=b"M\xfcller")
    with h5py.File(path, "r+") as file:
        file.attrs.create("slide_path", np.array(b"/s/M\xfcller.svs", dtype=object), dtype=h5py.string_dtype("utf-8"))
        assert "\udcfc" in file.attrs["slide_path"]
    report = FeatureExporter(path.parent, tmp_path / "out", "trident").run()
    assert [item.status for item in report.items] == ["failed"]
    assert r"attribute level0_mpp is \udcfc" in (tmp_path / "out" / "report.csv").read_text(encoding="utf-8")
    with h5py.File(path, "r+") as file:
        file.attrs["level0_mpp"] = 0.25
    attrs = read_features(path).attrs
    assert (attrs["slide_path"], attrs["slide_id"]) == (r"/s/M\udcfcller.svs", r"M\udcfcller")
    again = write_features(tmp_path / "b.h5", np.ones((1, 1)), np.zeros((1, 2), int), {"slide_path": "/s/\udcfc.svs"})
    assert read_feature_attrs(again)["slide_path"] == r"/s/\udcfc.svs"
