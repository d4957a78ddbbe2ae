"""Feature files for CLAM and TRIDENT, held to the keys, attributes, types and shapes that their readers use.

CLAM (``dataset_modules/dataset_generic.py``) loads ``pt_files/<slide_id>.pt`` as a tensor, or ``features`` and
``coords`` of ``h5_files/<slide_id>.h5``; its writer appends to data sets without a bound along N. TRIDENT
(``wsi_objects/WSI.py``, ``IO.py``) reads ``features`` and ``coords`` and the attributes of ``coords``:
``patch_size``, ``level0_magnification``, ``target_magnification`` must be there, and slide encoders take
``patch_size_level0``.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from cytossl_monai.data.bags.exchange import FeatureExporter, export_trident
from cytossl_monai.data.bags.features import read_features, write_features
from cytossl_monai.utils.errors import FeatureError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(2):
        attrs = {
            "slide_id": f"patient{number}",
            "slide_path": f"/slides/scan {number}.svs",
            "encoder_name": "UNI2-h",
            "patch_size": 224,
            "mpp": 0.5,
            "level0_mpp": 0.25,
            "level0_width": 9000,
            "level0_height": 8000,
            "overlap": 0,
        }
        coords = rng.integers(0, 8000, (70, 2))
        values = rng.normal(size=(70, 12)).astype(np.float32)
        write_features(tmp_path / "features" / f"patient{number}.h5", values, coords, attrs)
    return tmp_path / "features"


def test_clam_reads_it(folder: Path, tmp_path: Path) -> None:
    report = FeatureExporter(folder, tmp_path / "clam", "clam").run()
    assert report.exit_code == 0
    ours = read_features(folder / "patient1.h5")
    tensor = torch.load(tmp_path / "clam" / "pt_files" / "patient1.pt", weights_only=True)
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.from_numpy(ours.features))
    with h5py.File(tmp_path / "clam" / "h5_files" / "patient1.h5", "r+") as file:
        np.testing.assert_array_equal(file["features"][:], ours.features)
        np.testing.assert_array_equal(file["coords"][:], ours.coords)
        assert file["features"].dtype == np.float32
        file["features"].resize(len(ours) + 5, axis=0)  # as its writer appends


def test_trident_reads_it(folder: Path, tmp_path: Path) -> None:
    FeatureExporter(folder, tmp_path / "trident", "trident").run()
    ours = read_features(folder / "patient0.h5")
    with h5py.File(tmp_path / "trident" / "features_UNI2-h" / "scan 0.h5") as file:
        np.testing.assert_array_equal(file["features"][:], ours.features)
        np.testing.assert_array_equal(file["coords"][:], ours.coords)
        attrs = dict(file["coords"].attrs)
        assert file["features"].attrs["encoder"] == "UNI2-h"
    with h5py.File(tmp_path / "trident" / "patches" / "scan 0_patches.h5") as file:
        assert dict(file["coords"].attrs) == attrs
        assert file["coords"].dtype == np.int64
    assert (attrs["patch_size"], attrs["patch_size_level0"]) == (224, 448)
    assert (attrs["level0_magnification"], attrs["target_magnification"]) == (40, 20)
    # Its own rule for the side of a tile at level 0.
    assert attrs["patch_size"] * attrs["level0_magnification"] // attrs["target_magnification"] == 448
    assert (attrs["name"], attrs["overlap"]) == ("scan 0", 0)
    assert (attrs["level0_width"], attrs["level0_height"]) == (9000, 8000)


@pytest.mark.parametrize("layout", ["clam", "trident"])
def test_what_is_exported_is_read_here_again(layout: str, folder: Path, tmp_path: Path) -> None:
    FeatureExporter(folder, tmp_path / "out", layout).run()
    place = {"clam": "h5_files/patient0.h5", "trident": "features_UNI2-h/scan 0.h5"}[layout]
    again, ours = read_features(tmp_path / "out" / place), read_features(folder / "patient0.h5")
    np.testing.assert_array_equal(again.features, ours.features)
    np.testing.assert_array_equal(again.coords, ours.coords)


def test_what_cannot_be_exported_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "torn.h5").write_bytes(b"torn")
    report = FeatureExporter(folder, tmp_path / "out", "clam").run()
    assert report.exit_code == 3
    assert [item.status for item in report.items] == ["done", "done", "failed"]
    with pytest.raises(FeatureError, match="holds no feature file"):
        FeatureExporter(tmp_path / "out", tmp_path / "again").run()
    with pytest.raises(ValueError, match="layout must be one of clam, trident"):
        FeatureExporter(folder, tmp_path, "csv")
    bare = tmp_path / "bare.h5"
    write_features(bare, np.ones((2, 3), np.float32), np.zeros((2, 2), np.int64), {})
    with pytest.raises(FeatureError, match="do not say patch_size, patch_size_level0, level0_mpp"):
        export_trident(read_features(bare), "bare", tmp_path)
