"""Cells of a slide on a page: fields centred on nuclei, their features, and the order of likeness."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch
from inference_toy import CONFIGS, spoil
from monai.bundle import ConfigWorkflow

from cytossl_monai.data.bags.features import read_features
from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.data.tiles.nuclei_file import NucleusTable, nuclei_path
from cytossl_monai.index.build import IndexSettings, index_slides
from cytossl_monai.index.fields import NucleusFields
from cytossl_monai.inference import browse
from cytossl_monai.inference.browse import CellBrowser
from cytossl_monai.networks.files import load_encoder
from cytossl_monai.transforms import nuclei_mask
from cytossl_monai.utils.errors import SettingError
from cytossl_monai.visualize.cells_page import compact_features, write_cells_page


@pytest.fixture(scope="module")
def browsed(cohort, tmp_path_factory):
    """Folder of a run over one slide and one that does not exist."""
    out = tmp_path_factory.mktemp("browse")
    table = out / "slides.csv"
    table.write_text(f"slide_id,path\na<b,{cohort.path(0)}\ngone,{out / 'gone.tif'}\n".replace("a<b", "a b"))
    settings = {"slides": str(table), "encoder": str(cohort.encoder), "output_dir": str(out / "cells")}
    settings |= {"max_cells": 40, "tile_size": 64, "mpp": 0.5, "num_threads": 1, "device": torch.device("cpu")}
    workflow = ConfigWorkflow(str(CONFIGS / "browse.json"), workflow_type="infer", logging_file=False, **settings)
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


def test_the_cells_are_a_draw_of_the_indexed_nuclei(browsed):
    index_path = browsed / "cache" / "index" / "a b.parquet"
    index, nuclei = TileIndex.read(index_path), NucleusTable.read(nuclei_path(index_path))
    drawn = NucleusFields(64, 0.5, 40, odd_share=0.0, seed=0).of(index, nuclei)
    assert len(nuclei) > 40
    np.testing.assert_array_equal(read_features(browsed / "a b" / "cells.h5").coords, drawn.coords)


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


@pytest.fixture
def browser(cohort, tmp_path):
    encoder, _ = load_encoder(cohort.encoder)
    both = [SlideRecord(path.stem, path, None, path.stem) for path in (cohort.path(0), cohort.path(1))]

    def of(records=both, **settings):
        options = {"tile_size": 64, "mpp": 0.5, "max_cells": 12, "num_threads": 1, **settings}
        return CellBrowser(records, encoder, tmp_path, **options)

    return of


def test_browsing_goes_on_where_it_was(browser, tmp_path, monkeypatch):
    pages = [tmp_path / name / "cells.html" for name in ("slide_0000", "slide_0001")]

    def killed(path, *args):
        if path == pages[1]:
            raise KeyboardInterrupt
        return write_cells_page(path, *args)

    def statuses(**settings):
        return [item.status for item in browser(**settings).run().items]

    with monkeypatch.context() as patch:
        patch.setattr(browse, "write_cells_page", killed)
        with pytest.raises(KeyboardInterrupt):
            browser().run()
    assert "slide_0000,done,12 cells" in (tmp_path / "report.csv").read_text()
    before = pages[0].stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(browse, "embed_to_file", None)  # the features of the second slide are there
        assert statuses() == ["current", "done"]
        assert statuses() == ["current", "current"]
    assert pages[0].stat().st_mtime_ns == before
    # The page of other cells does not stay beside the features of these.
    with monkeypatch.context() as patch:
        patch.setattr(browse, "write_cells_page", killed)
        with pytest.raises(KeyboardInterrupt):
            browser(seed=1).run()
    assert not pages[1].exists()
    assert statuses(seed=1) == ["current", "done"]


def test_fields_on_a_damaged_place_are_left_out(browser, cohort, tmp_path):
    record = SlideRecord("worn", spoil(cohort.path(0), tmp_path / "worn.tif", [3]), None, "worn")
    index_slides(
        [record], tmp_path / "cache" / "index", IndexSettings(max_unreadable=0.9), 0, overview=False, progress=False
    )
    (line,) = browser([record], tile_size=160, max_cells=1000).run().items
    assert re.fullmatch(r"[1-9]\d* cells; [1-9]\d* damaged fields left out", line.message)
    features = read_features(tmp_path / "worn" / "cells.h5")
    with open_slide(record.path) as slide:
        assert slide.sound(features.coords, 160, 0.5).all()
    content = re.search(r'id="content">(.*?)</script>', (tmp_path / "worn" / "cells.html").read_text())[1]
    assert len(json.loads(content)["places"]) == len(features)


def test_fields_that_no_picture_of_the_page_can_hold_are_refused_early(browser):
    with pytest.raises(SettingError, match=r"tile_size is 4096.*at most 4093"):
        browser(tile_size=4096)


def test_compact_features_keep_what_is_near():
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(5, 200))
    features = np.repeat(groups, 20, axis=0) + 0.2 * rng.normal(size=(100, 200))
    compact = compact_features(features, 16).astype(float)
    nearest = (compact @ compact.T - 1e9 * np.eye(100)).argmax(1)
    assert (nearest // 20 == np.arange(100) // 20).all()
    assert compact_features(np.ones((3, 8))).shape == (3, 3)
