"""Overlay, gallery and report: what a person sees is what the numbers say."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from report_fixtures import cell_picture, chromium_dom, empty_answer, gallery_tiles, slide_report

from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.write import write_pyramid
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.visualize.cohort_page import write_cohort_page
from cytossl_monai.visualize.gallery import draw_gallery, outline_nuclei, read_gallery
from cytossl_monai.visualize.heatmap import tile_map
from cytossl_monai.visualize.overlay import blend, draw_overlay, nice_length
from cytossl_monai.visualize.report_page import NOTICE, SlideReport, write_preview, write_report


def test_overlay_scale_bar_and_legend(tmp_path):
    thumbnail = np.full((3, 400, 800), 255, np.uint8)
    heat = tile_map(np.array([[0, 0]]), np.array([1.0]), 1000, 8000, 4000, 0.25)
    picture = np.asarray(Image.open(draw_overlay(tmp_path / "o.png", thumbnail, heat, "slide", "evidence")))
    ink = (picture[-42:] == (33, 37, 41)).all(-1)
    bar = max(ink.sum(1))
    um_per_pixel = 8000 * 0.25 / 800
    assert bar * um_per_pixel == pytest.approx(500, rel=0.02)  # 2000 um wide: a quarter of it is 500
    seen = np.unique(picture[-60:, 500:].reshape(-1, 3), axis=0)
    assert len(seen) > 100  # the legend's ramp


@pytest.mark.parametrize("legend", ["evidence", "attention x suspicion"])
def test_the_words_under_the_legend_stand_apart(tmp_path, legend):
    thumbnail = np.full((3, 400, 800), 255, np.uint8)
    heat = tile_map(np.array([[0, 0]]), np.array([1.0]), 1000, 8000, 4000, 0.25)
    picture = np.asarray(Image.open(draw_overlay(tmp_path / "o.png", thumbnail, heat, "slide", legend)))
    columns = np.flatnonzero((picture[-30:, 400:] != 255).any(-1).any(0))  # below the ramp, right of the scale bar
    assert (np.diff(columns) > 9).sum() == 2  # low, the legend, high; spaces within it are narrower


@pytest.mark.parametrize(("limit", "wanted"), [(1, 1), (1.99, 1), (2, 2), (49, 20), (50, 50), (999, 500), (0.3, 0.2)])
def test_nice_length(limit, wanted):
    assert nice_length(limit) == pytest.approx(wanted)


def test_blend_keeps_dark_dark_and_glass_without_tiles_as_it_was():
    thumbnail = np.full((3, 100, 100), 230, np.uint8)
    thumbnail[:, 20:30, 20:30] = 10
    heat = tile_map(np.array([[0, 0]]), np.array([1.0]), 500, 1000, 1000, 0.25)
    over = np.asarray(blend(thumbnail, heat))
    assert (over[60:] == 230).all()
    assert over[25, 25].max() <= 10
    assert over[5, 5].min() < 150  # coloured


def test_outline_leaves_the_nuclei_as_they_are():
    image = cell_picture()
    labels = np.zeros(image.shape[1:], np.int32)
    labels[40:60, 40:60], labels[60:80, 40:60] = 1, 2  # they touch
    out = outline_nuclei(image, labels)
    np.testing.assert_array_equal(out[:, labels > 0], image[:, labels > 0])
    changed = (out != image).any(0)
    assert changed[39, 40:60].all()
    assert changed.sum() < 4 * 60


def test_gallery_reads_the_tiles_where_they_are(tmp_path):
    picture = np.tile(cell_picture().transpose(1, 2, 0), (4, 4, 1))
    path = write_pyramid(tmp_path / "s.tif", picture, 0.25)
    places = [(0, 0), (128, 256), (384, 128)]
    table = pd.DataFrame([{"slide_id": "s", "x": x, "y": y, "size": 128, "level": 0} for x, y in places])
    table = table.assign(mpp=0.5, n_nuclei=1, nuclei_fraction=0.1, foreground_fraction=0.5, sharpness=1.0)
    meta = {"slide_id": "s", "slide_path": str(path), "level0_mpp": 0.25, "settings": {"tile_size": 64, "mpp": 0.5}}
    index = TileIndex(table, meta)
    with open_slide(path) as slide:
        attention, score = np.array([0.2, 0.5, 0.3]), np.array([0.1, 0.9, 0.4])
        tiles = read_gallery(slide, index, attention, score, np.array([1, 2]))
        assert [(t.x, t.y) for t in tiles] == [(128, 256), (384, 128)]
        np.testing.assert_array_equal(tiles[0].image, slide.read_region(128, 256, 128))  # finer than the encoder's
    assert tiles[0].attention == pytest.approx(1.5)
    assert tiles[0].score == pytest.approx(0.9)
    assert len(tiles[0].nuclei) == 1
    centre = tiles[0].contours[0].mean(0)
    assert centre == pytest.approx(tiles[0].nuclei[["x", "y"]].to_numpy()[0] + 0.5, abs=1.5)
    assert Image.open(draw_gallery(tmp_path / "g.png", tiles, "s")).size[0] >= 2 * 256
    assert draw_gallery(tmp_path / "none.png", [], "s").is_file()


class _Links(HTMLParser):
    """Collects every address that a browser would fetch or follow, and whether tags are balanced."""

    def __init__(self):
        super().__init__()
        self.fetched, self.followed, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if tag not in ("meta", "link", "img", "input", "br", "path", "rect", "line", "i"):
            self.open.append(tag)
        for key in ("src", "srcset", "poster", "data", "xlink:href"):
            self.fetched += [named[key]] if key in named else []
        if "href" in named:
            (self.followed if tag == "a" else self.fetched).append(named["href"])

    def handle_endtag(self, tag):
        if tag not in ("path", "rect", "line", "i"):
            assert self.open.pop() == tag


def links(path):
    parser = _Links()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def test_report_holds_all_and_fetches_nothing(tmp_path):
    path = write_report(tmp_path / "report.html", slide_report("a<b>&'\"c"))
    text, found = path.read_text(encoding="utf-8"), links(path)
    assert found.fetched
    assert all(address.startswith("data:") for address in found.fetched)
    assert all(not re.match(r"[a-z]+:|//", address) for address in found.followed)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text
    assert text.count(NOTICE) >= 2
    assert "<b>&'" not in text  # escaped
    assert "positive" in text
    assert "0.87" in text


def test_report_without_cells_names_no_class(tmp_path):
    report = SlideReport(empty_answer(), np.full((3, 40, 60), 240, np.uint8))
    path = write_report(tmp_path / "report.html", report)
    text = path.read_text(encoding="utf-8").lower()
    assert "no cells found" in text
    assert NOTICE.lower() in text
    for word in ("negative", "positive", "suspicion <b", "most probable"):
        assert word not in text
    assert all(address.startswith("data:") for address in links(path).fetched)


def test_cohort_page_is_sorted_by_suspicion_and_names_who_is_missing(tmp_path):
    answers = [slide_report(name, p).answer for name, p in (("mid", 0.5), ("top & <high>", 0.9), ("low", 0.1))]
    (tmp_path / "mid").mkdir()
    write_preview(tmp_path / "mid" / "preview.jpg", slide_report("mid", 0.5))
    path = write_cohort_page(tmp_path / "index.html", [*answers, empty_answer()], {"torn": "torn.svs is truncated"})
    text = path.read_text(encoding="utf-8")
    assert re.findall(r'data-name="([^"]+)"', text) == ["top &amp; &lt;high&gt;", "mid", "low"]
    assert "no cells found" in text
    assert "torn.svs is truncated" in text
    assert NOTICE in text
    assert "5 slides" in text
    found = links(path)
    assert set(found.fetched) == {"data:,", "mid/preview.jpg"}
    assert "top%20%26%20%3Chigh%3E/report.html" in found.followed


@pytest.mark.parametrize("size", ["1200,900", "390,844"])
def test_report_runs_in_a_browser(tmp_path, size):
    path = write_report(tmp_path / "report.html", slide_report("s"))
    dom, log = chromium_dom(path, tmp_path / "profile", size)
    assert 'data-ready="true"' in dom
    assert "data-error" not in dom
    assert "CONSOLE" not in log
    assert len(re.findall(r'<button class="tile', dom)) == len(gallery_tiles())


def test_choice_of_a_tile_by_link_and_pages_without_predictions(tmp_path):
    path = write_report(tmp_path / "report.html", slide_report("s"))
    dom, _ = chromium_dom(path, tmp_path / "profile", "800,600", "#tile-2")
    assert "Tile 2: suspicion" in dom
    empty = write_report(tmp_path / "empty.html", SlideReport(empty_answer(), np.full((3, 40, 60), 240, np.uint8)))
    cohort = write_cohort_page(tmp_path / "index.html", [slide_report("s").answer, empty_answer()])
    for page in (empty, cohort):
        dom, log = chromium_dom(page, tmp_path / "profile", "800,600")
        assert 'data-ready="true"' in dom
        assert "data-error" not in dom
        assert "CONSOLE" not in log
