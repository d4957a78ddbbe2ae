"""Cells of a slide on a page: fields centred on nuclei, their features, and the order of likeness."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch
from inference_toy import CONFIGS
from monai.bundle import ConfigWorkflow

from cytossl_monai.data.bags.features import read_features
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.inference.browse import cell_fields
from cytossl_monai.networks.files import load_encoder
from cytossl_monai.transforms import nuclei_mask
from cytossl_monai.utils.errors import TableError
from cytossl_monai.visualize.cells_page import compact_features


@pytest.fixture(scope="module")
def browsed(cohort, tmp_path_factory):
    """Folder of a run over one slide and one that does not exist."""
    out = tmp_path_factory.mktemp("browse")
    table = out / "slides.csv"
    table.write_text(f"slide_id,path\na<b,{cohort.path(0)}\ngone,{out / 'gone.tif'}\n".replace("a<b", "a b"))
    given = {"slides": str(table), "encoder": str(cohort.encoder), "output_dir": str(out / "cells")}
    given |= {"max_cells": 40, "tile_size": 64, "mpp": 0.5, "num_threads": 1, "device": torch.device("cpu")}
    workflow = ConfigWorkflow(str(CONFIGS / "browse.json"), workflow_type="infer", logging_file=False, **given)
    workflow.initialize()
    with pytest.raises(SystemExit) as stop:
        workflow.run()
    assert stop.value.code == 3
    return out / "cells"


def test_a_slide_that_fails_is_named_and_the_others_go_on(browsed):
    report = (browsed / "report.csv").read_text()
    assert re.search(r"a b,done,\d+ cells", report)
    assert "gone,failed," in report
    assert "does not exist" in report


def test_features_are_the_encoders_of_fields_centred_on_nuclei(browsed, cohort):
    features = read_features(browsed / "a b" / "cells.h5")
    encoder, _ = load_encoder(cohort.encoder)
    with open_slide(cohort.path(0)) as slide:
        fields = torch.from_numpy(np.asarray(slide.read_regions(features.coords, 64, mpp=0.5)))
    with torch.no_grad():
        np.testing.assert_allclose(features.features, encoder(fields).numpy(), atol=1e-5)
    masks = nuclei_mask(fields, torch.full((len(fields),), 0.5))[:, 0]
    assert 10 < len(fields) <= 40
    assert (masks[:, 30:34, 30:34].float().mean((1, 2)) > 0.5).float().mean() > 0.9
    anywhere = masks.float().mean()
    assert anywhere < 0.5


def test_each_nucleus_comes_once_and_the_draw_has_a_seed(cohort):
    index = TileIndex.read(cohort.index / "slide_0000.parquet")
    with open_slide(cohort.path(0)) as slide:
        first, again, other = (cell_fields(slide, index, 64, 0.5, 30, seed) for seed in (0, 0, 1))
        everything = cell_fields(slide, index, 64, 0.5, 100_000)
    assert np.array_equal(first.coords, again.coords)
    assert not np.array_equal(first.coords, other.coords)
    near = np.linalg.norm(everything.coords[:, None] - everything.coords[None], axis=2) + 1e9 * np.eye(len(everything))
    assert len(everything) > len(first)
    assert (near.min(1) * slide.mpp > 1.0).all()


def test_the_page_orders_by_likeness_and_needs_no_network(browsed):
    page = (browsed / "a b" / "cells.html").read_text()
    assert "<h1>Cells of a b</h1>" in page
    assert not re.search(r"""(?:src|href)=["']?https?:""", page)
    content = json.loads(re.search(r'id="content">(.*?)</script>', page)[1])
    stored = np.frombuffer(base64.b64decode(content["features"]), np.int8).reshape(-1, content["width"]).astype(float)
    features = read_features(browsed / "a b" / "cells.h5")
    assert len(stored) == len(features.features) == len(content["places"])
    centred = features.features - features.features.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(stored @ stored.T / 127**2, centred @ centred.T, atol=0.05)
    half = 64 * 0.5 / 0.25 / 2
    np.testing.assert_allclose(np.array(content["places"]), features.coords + half, atol=1)


def test_compact_features_keep_what_is_near():
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(5, 200))
    features = np.repeat(groups, 20, axis=0) + 0.2 * rng.normal(size=(100, 200))
    compact = compact_features(features, 16).astype(float)
    nearest = (compact @ compact.T - 1e9 * np.eye(100)).argmax(1)
    assert (nearest // 20 == np.arange(100) // 20).all()
    assert compact_features(np.ones((3, 8))).shape == (3, 3)


def test_a_slide_without_a_nucleus_gets_a_sentence(cohort, monkeypatch):
    index = TileIndex.read(cohort.index / "slide_0000.parquet")
    monkeypatch.setattr(
        "cytossl_monai.inference.browse.nuclei_mask", lambda images, mpp: torch.zeros_like(images[:, :1]).bool()
    )
    with open_slide(cohort.path(0)) as slide, pytest.raises(TableError, match="no nucleus was found"):
        cell_fields(slide, index, 64, 0.5)
