"""scripts/release.py: what it refuses, and that the same content gives the same bytes."""

import hashlib
import json
import shutil
import zipfile

import pytest
from conftest import BUNDLES, ROOT, load_release

import cytossl_monai

release = load_release()


@pytest.fixture
def checkout(tmp_path):
    """Bundles and changelog of the project, to be spoiled."""
    skip = shutil.ignore_patterns("model.pt", "classifier.pt", "*.ts", "output", "eval")
    shutil.copytree(ROOT / "bundles", tmp_path / "bundles", ignore=skip)
    version = cytossl_monai.__version__
    (tmp_path / "CHANGELOG.md").write_text(
        f"# Changelog\n\n## Unreleased\n\n## {version}\n\n- News.\n\n## 0.0.1\n\n- Old.\n"
    )
    return tmp_path


def test_archives_hold_the_bundle_and_its_weights(archives):
    sums = (archives["cytossl_mil"].parent / "SHA256SUMS").read_text().splitlines()
    told = dict(reversed(line.split("  ")) for line in sums)
    for name, path in archives.items():
        assert path.name == f"{name}_v{cytossl_monai.__version__}.zip"
        assert told[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            members = archive.namelist()
        assert {m.split("/")[0] for m in members} == {name}
        assert {f"{name}/models/model.pt", f"{name}/models/model.ts", f"{name}/configs/metadata.json"} <= set(members)
    assert "cytossl_inference/models/classifier.pt" in members
    with zipfile.ZipFile(archives["cytossl_pretrain"]) as archive:
        shipped = ROOT / "bundles" / "cytossl_pretrain" / "models" / "lite0_cells.pt"
        assert archive.read("cytossl_pretrain/models/lite0_cells.pt") == shipped.read_bytes()


def test_same_content_same_bytes_and_notes(checkout, cohort, tmp_path):
    weights = [f"cytossl_mil={cohort.classifier}"]
    one, two = (release.build_release(tmp_path / d, weights, checkout, torchscript=False) for d in "ab")
    assert len(one) == len(BUNDLES)
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    notes = (tmp_path / "a" / "RELEASE_NOTES.md").read_text()
    assert "- News." in notes
    assert "- Old." not in notes


def test_a_checkout_without_the_encoder_that_ships_is_refused(checkout, tmp_path):
    shipped = checkout / "bundles" / "cytossl_pretrain" / "models" / "lite0_cells.pt"
    for spoil in (lambda: shipped.write_bytes(b"no weights"), shipped.unlink):
        spoil()
        with pytest.raises(release.ReleaseError, match=r"lite0_cells\.pt.*git checkout"):
            release.build_release(tmp_path / "dist", [], checkout, torchscript=False)
    assert not (tmp_path / "dist").exists()


def spoil_metadata(checkout, **changes):
    path = checkout / "bundles" / "cytossl_mil" / "configs" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_refused_before_anything_is_written(checkout, cohort, tmp_path):
    def build(*weights):
        release.build_release(tmp_path / "dist", weights, checkout, torchscript=False)

    with pytest.raises(release.ReleaseError, match=r"encoder\.pt: not a classifier file"):
        build(f"cytossl_mil={cohort.encoder}")
    with pytest.raises(release.ReleaseError, match=r"cytossl_inference/classifier\.pt"):
        build("cytossl_mil/other.pt=x")
    (checkout / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- News.\n")
    with pytest.raises(release.ReleaseError, match="has no entry"):
        build()
    spoil_metadata(checkout, changelog={"0.0.1": "first"})
    with pytest.raises(release.ReleaseError, match="no changelog entry for its version"):
        build()
    (checkout / "bundles" / "cytossl_mil" / "LICENSE").unlink()
    with pytest.raises(release.ReleaseError, match="LICENSE is missing"):
        build()
    assert not (tmp_path / "dist").exists()
