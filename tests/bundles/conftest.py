"""The three bundles as a user gets them: release archives with small weights, unpacked by MONAI's own download."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from monai.bundle import download

from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.data.synthetic.slides import make_slides
from cytossl_monai.index.build import IndexSettings, index_slides
from cytossl_monai.inference.embed import embed_slides
from cytossl_monai.networks.files import save_classifier, save_encoder
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ("cytossl_pretrain", "cytossl_mil", "cytossl_inference")


def load_release():
    """scripts/release.py as a module."""
    spec = importlib.util.spec_from_file_location("cytossl_release", ROOT / "scripts" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Cohort:
    """Four synthetic slides with index and features, and an encoder and a classifier that fit them."""

    root: Path
    slides: Path
    index: Path
    features: Path
    encoder: Path
    classifier: Path


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("ignite").setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("cohort")
    slides = make_slides(root / "slides", 4, 1024, seed=5, blur=0, progress=False)
    index_slides(read_slide_table(slides), root / "index", IndexSettings(), num_workers=0, progress=False)
    encoder = Encoder(sr_vit_tiny(num_layers=1)).eval()
    save_encoder(root / "encoder.pt", encoder, {"name": "toy"})
    embed_slides(read_slide_table(slides), root / "index", root / "features", encoder, "toy", progress=False)
    known = {"hash": encoder_hash(encoder), "name": "toy", "dim": encoder.embed_dim}
    classifier = MILClassifier(ABMIL(encoder.embed_dim, 2), ["negative", "positive"], encoder=known, temperature=1.3)
    save_classifier(root / "classifier.pt", classifier)
    return Cohort(root, slides, root / "index", root / "features", root / "encoder.pt", root / "classifier.pt")


@pytest.fixture(scope="session")
def archives(cohort, tmp_path_factory):
    """What scripts/release.py builds, by bundle."""
    weights = [f"cytossl_pretrain={cohort.encoder}", f"cytossl_mil={cohort.classifier}"]
    weights += [f"cytossl_inference={cohort.encoder}", f"cytossl_inference/classifier.pt={cohort.classifier}"]
    built = load_release().build_release(tmp_path_factory.mktemp("dist"), weights, draft=True)
    return dict(zip(BUNDLES, built))


@pytest.fixture(scope="session")
def installed(archives, tmp_path_factory):
    """Folder with the bundles, far from the checkout; they cannot be written to (but root may)."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name, archive in archives.items():
        download(name=name, bundle_dir=str(folder), source="github", url=archive.as_uri(), progress=False)
        for path in sorted((folder / name).rglob("*"), reverse=True):
            os.chmod(path, 0o555 if path.is_dir() else 0o444)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            os.chmod(path, 0o755)


@pytest.fixture(autouse=True)
def _foreign_folder(tmp_path, monkeypatch):
    """Every test runs in a folder that knows nothing of the project."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
