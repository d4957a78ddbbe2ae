"""Two tiny slides with an encoder and a classifier that fit them, and what a run over them wrote."""

from __future__ import annotations

import logging

import pytest
from inference_toy import Cohort, make_classifier, make_encoder, run_inference

from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.data.synthetic.slides import make_slides
from cytossl_monai.index.build import IndexSettings, index_slides
from cytossl_monai.inference.evidence import EVIDENCE


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("ignite").setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("inference")
    slides = make_slides(root / "slides", 2, 1024, seed=1, density=900.0, blur=0.0, progress=False)
    settings = IndexSettings(tile_size=96)
    index_slides(read_slide_table(slides), root / "index", settings, num_workers=0, overview=False, progress=False)
    encoder = make_encoder(root / "model.pt")
    return Cohort(slides, root / "index", root / "model.pt", make_classifier(root / "classifier.pt", encoder))


@pytest.fixture(scope="session")
def inferred(cohort, tmp_path_factory):
    """Folder of one run over both bare slides, with all evidence."""
    out = tmp_path_factory.mktemp("inferred")
    status, report = run_inference(cohort, out, index_dir=str(out / "cache" / "index"), evidence=list(EVIDENCE))
    assert status == 0
    assert {item.status for item in report.values()} == {"done"}
    return out
