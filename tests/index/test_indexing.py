import csv
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from cytossl_monai.data.slide_table import SlideRecord, read_slide_table
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.write import write_pyramid
from cytossl_monai.data.synthetic.slides import make_slides
from cytossl_monai.data.tiles.index_file import COLUMNS, TileIndex
from cytossl_monai.data.tiles.nuclei_file import NucleusTable, nuclei_path
from cytossl_monai.index.build import IndexSettings, SlideIndexer, index_slide, index_slides
from cytossl_monai.index.low_power import Grid, InkRules, find_ink, tile_means
from cytossl_monai.utils.errors import SettingError

SIZE = 1792
TILE = 448  # level-0 pixels: 224 px at 0.5 um/px of a slide at 0.25


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return make_slides(tmp_path_factory.mktemp("slides"), 2, SIZE, seed=5, blur=0, progress=False)


@pytest.fixture(scope="module")
def indexed(slides):
    return [(r, index_slide(r)) for r in read_slide_table(slides)]


def glass(size=(1024, 1024), value=240, seed=0):
    rng = np.random.default_rng(seed)
    return (np.full((*size, 3), value, float) + rng.normal(0, 1.5, (*size, 3))).clip(0, 255).astype(np.uint8)


def discs(image, centres, radius, colour):
    ys, xs = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disc = xs**2 + ys**2 <= radius**2
    for x, y in centres:
        patch = image[y - radius : y + radius + 1, x - radius : x + radius + 1]
        patch[disc[: patch.shape[0], : patch.shape[1]]] = colour
    return image


def slide_of(tmp_path, image, name="a", mpp=0.25):
    return SlideRecord(name, write_pyramid(tmp_path / f"{name}.tif", image, mpp), None, name)


def truth_of(slides, record):
    cells = pd.read_csv(slides.parent / "truth" / f"{record.slide_id}.csv")
    cells = cells[~cells["class"].isin(["debris"])]
    return cells.nucleus_x + cells.nucleus_w / 2, cells.nucleus_y + cells.nucleus_h / 2


def test_columns_and_meta(indexed):
    record, index = indexed[0]
    table = index.table
    assert list(table.columns) == list(COLUMNS)
    assert (table["size"] == TILE).all()
    assert (table[["x", "y"]] % TILE == 0).all().all()
    assert not table.duplicated(["x", "y"]).any()
    assert (table.level == 1).all()
    assert (table.n_nuclei >= 1).all()
    for name in ("nuclei_fraction", "foreground_fraction"):
        assert table[name].between(0, 1).all()
    assert (table.nuclei_fraction > 0).all()
    assert (table.foreground_fraction > table.nuclei_fraction).mean() > 0.9
    assert table.sharpness.quantile(0.9) == pytest.approx(1, abs=0.1)
    assert index.meta["level0_mpp"] == pytest.approx(0.25)
    assert (index.slide_id, index.slide_path, index.tile_size) == (record.slide_id, record.path, 224)
    assert index.meta["settings"]["min_nuclei"] == 1


def test_nuclei_lie_in_kept_tiles_and_kept_tiles_hold_nuclei(slides, indexed):
    for record, index in indexed:
        x, y = truth_of(slides, record)
        kept = set(zip(index.table.x, index.table.y))
        tile_of = list(zip(x // TILE * TILE, y // TILE * TILE))
        assert np.mean([tile in kept for tile in tile_of]) >= 0.98
        assert np.mean([tile in set(tile_of) for tile in kept]) >= 0.9
        counts = pd.Series(tile_of).value_counts()
        merged = index.table.assign(truth=[counts.get((a, b), 0) for a, b in zip(index.table.x, index.table.y)])
        # Nuclei that overlap count as one; the order of the tiles is what a sampler needs.
        assert merged.n_nuclei.corr(merged.truth) > 0.85


def test_threads_change_nothing(slides, indexed):
    record, index = indexed[1]
    pd.testing.assert_frame_equal(index_slide(record, num_threads=3).table, index.table)


def test_resolution_of_the_table_counts(slides, indexed):
    record = indexed[0][0]
    other = SlideRecord(record.slide_id, record.path, None, "p", mpp=0.5)
    index = index_slide(other)
    assert (index.table["size"] == 224).all()
    assert index.level0_mpp == 0.5


def test_counts_each_nucleus_once_at_tile_borders(tmp_path):
    # Nuclei on a lattice that crosses tile and block borders everywhere; 8 um across.
    centres = [(x, y) for x in range(60, 3500, 120) for y in range(60, 3500, 120)]
    record = slide_of(tmp_path, discs(glass((3584, 3584)), centres, 16, (70, 60, 110)))
    index = index_slide(record)
    assert len(index) == 64
    assert index.table.n_nuclei.sum() == len(centres)
    for x, y, n in index.table[["x", "y", "n_nuclei"]].itertuples(index=False):
        inside = sum(x + 4 < cx < x + TILE - 4 and y + 4 < cy < y + TILE - 4 for cx, cy in centres)
        at_most = sum(x - 4 <= cx <= x + TILE + 4 and y - 4 <= cy <= y + TILE + 4 for cx, cy in centres)
        assert inside <= n <= at_most
    area = np.pi * 16**2 * len(centres) / (64 * TILE**2)
    assert index.table.nuclei_fraction.mean() == pytest.approx(area, rel=0.25)
    # At low power the pixels on a nucleus' border count as foreground too.
    assert area <= index.table.foreground_fraction.mean() <= 2.2 * area


def test_a_border_cell_is_not_lost(tmp_path):
    record = slide_of(tmp_path, discs(glass((1000, 1100)), [(1085, 985)], 15, (70, 60, 110)))
    index = index_slide(record)
    assert index.table[["x", "y", "n_nuclei"]].to_numpy().tolist() == [[896, 896, 1]]


def test_blank_glass_is_empty(tmp_path):
    report = index_slides([slide_of(tmp_path, glass())], tmp_path / "out", num_workers=0, progress=False)
    (item,) = report.items
    assert (item.status, report.exit_code) == ("empty", 1)
    assert "nothing but glass" in item.message
    assert not (tmp_path / "out/a.parquet").exists()
    assert (tmp_path / "out/a_overview.png").exists()


@pytest.mark.parametrize("colour", [(30, 140, 60), (20, 20, 30), (25, 40, 190), (200, 20, 30)], ids="gkbr")
def test_pen_marks_are_left_out(tmp_path, colour):
    image = glass((2048, 2048))
    image[200:1400, 300:900] = colour  # 300 x 150 um
    cells = [(1700, 1700), (1500, 1800)]
    index = index_slide(slide_of(tmp_path, discs(image, cells, 16, (70, 60, 110))))
    assert index.meta["tiles"]["ink"] >= 6
    assert index.table.n_nuclei.sum() == 2
    assert (index.table.x >= 1344).all()


def test_only_ink(tmp_path):
    image = glass((2048, 2048))
    image[300:1700, 300:1700] = (20, 20, 20)
    report = index_slides([slide_of(tmp_path, image)], tmp_path / "out", num_workers=0, progress=False)
    assert report.items[0].status == "empty"
    assert "pen marks" in report.items[0].message


def test_find_ink_takes_the_broad_and_large():
    inky = np.zeros((200, 200), bool)
    inky[20:70, 20:120] = True  # broad and large at 4 um/px: 200 x 400 um
    inky[100:105, :] = True  # a thread, 20 um
    inky[150:170, 150:170] = True  # broad, small: 80 um
    found = find_ink(inky, 4.0, InkRules(stroke_um=60, area_mm2=0.04, margin_um=0))
    expected = np.zeros_like(inky)
    expected[20:70, 20:120] = True
    np.testing.assert_array_equal(found, expected)
    wider = find_ink(inky, 4.0, InkRules(stroke_um=60, area_mm2=0.04, margin_um=8))
    assert wider[18:72, 20:120].all()
    assert not wider[100:105].any()
    assert not find_ink(np.zeros((5, 5), bool), 4.0, InkRules()).any()


def half_blurred(tmp_path, sigma_um):
    """A slide of nuclei whose right half, from x = 896 on, is out of focus."""
    from scipy.ndimage import gaussian_filter

    centres = [(x, y) for x in range(100, 1800, 150) for y in range(100, 1800, 150)]
    image = discs(glass((1792, 1792)), centres, 16, (70, 60, 110))
    pixels = sigma_um / 0.25
    image[:, 896:] = gaussian_filter(image.astype(float), (pixels, pixels, 0)).astype(np.uint8)[:, 896:]
    return slide_of(tmp_path, image, f"blur_{sigma_um:g}".replace(".", "_"))


def test_tiles_out_of_focus_are_left_out(tmp_path):
    assert set(index_slide(half_blurred(tmp_path, 3.0)).table.x) == {0, 448}
    # A slighter blur leaves nuclei to be found; then the tile's sharpness against the slide's own is what decides.
    record = half_blurred(tmp_path, 1.5)
    by_tile = index_slide(record, IndexSettings(min_edge=0, min_sharpness=0.5))
    assert set(by_tile.table.x) == {0, 448}
    assert by_tile.meta["tiles"]["out_of_focus"] == 8
    loose = index_slide(record, IndexSettings(min_edge=0, min_sharpness=0))
    assert set(loose.table.x) == {0, 448, 896, 1344}
    assert loose.table[loose.table.x > 800].sharpness.max() < loose.table[loose.table.x < 800].sharpness.min()


def test_tile_means_against_loops():
    rng = np.random.default_rng(0)
    image = rng.random((57, 43)) > 0.5
    grid = Grid(size=40, columns=6, rows=7)
    scale, (x0, y0) = 4.0, (-24.0, 30.0)
    got = tile_means(image, scale, (x0, y0), grid, (1, 7), (0, 5))
    expected = np.zeros((6, 5))
    for r in range(57):
        for c in range(43):
            row, column = int((y0 + (r + 0.5) * scale) // 40) - 1, int((x0 + (c + 0.5) * scale) // 40)
            if 0 <= row < 6 and 0 <= column < 5:
                expected[row, column] += image[r, c] / 100
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_run_is_resumable_and_reports(slides, tmp_path):
    records = read_slide_table(slides)
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"no slide")
    records += [SlideRecord("bad", bad, None, "p"), SlideRecord("gone", tmp_path / "gone.tif", None, "p")]
    records.append(slide_of(tmp_path, glass(), "blank"))
    out = tmp_path / "out"
    report = index_slides(records, out, num_workers=2, progress=False)
    status = {i.item: i.status for i in report.items}
    assert status == {"slide_0000": "done", "slide_0001": "done", "bad": "failed", "gone": "failed", "blank": "empty"}
    assert report.exit_code == 3
    with open(out / "report.csv", newline="") as stream:
        rows = {row["item"]: row for row in csv.DictReader(stream)}
    assert "does not exist" in rows["gone"]["message"]
    assert "bad.tif" in rows["bad"]["message"]
    assert all("\n" not in row["message"] for row in rows.values())
    first = out / "slide_0000.parquet"
    before = first.stat().st_mtime_ns
    picture = Image.open(out / "slide_0000_overview.png")
    assert max(picture.size) <= 1600
    red = np.asarray(picture).astype(int)
    assert ((red[..., 0] - red[..., 1]) > 60).mean() > 0.01, "no tile is drawn"

    # a second run, after a torn index, a picture lost and a slide changed in between
    (out / "slide_0001.parquet").write_bytes(b"PAR1")
    again = index_slides(records, out, num_workers=0, progress=False)
    status = {i.item: i.status for i in again.items}
    assert (status["slide_0000"], status["slide_0001"]) == ("current", "done")
    assert first.stat().st_mtime_ns == before
    assert len(TileIndex.read(out / "slide_0001.parquet")) > 0
    changed = index_slides(records[:1], out, IndexSettings(min_nuclei=2), num_workers=0, progress=False)
    assert changed.items[0].status == "done"
    assert TileIndex.read(first).table.n_nuclei.min() >= 2


def test_an_index_of_another_slide_is_not_current(slides, tmp_path):
    records = read_slide_table(slides)
    swapped = SlideRecord(records[0].slide_id, records[1].path, None, "p")
    index_slides(records[:1], tmp_path, num_workers=0, progress=False)
    report = index_slides([swapped], tmp_path, num_workers=0, progress=False)
    assert report.items[0].status == "done"
    assert TileIndex.read(tmp_path / f"{swapped.slide_id}.parquet").slide_path == records[1].path


@pytest.mark.parametrize("planted", [False, True], ids=["killed", "left behind"])
def test_nuclei_of_other_settings_beside_an_index_are_not_current(slides, tmp_path, monkeypatch, planted):
    records, path = read_slide_table(slides)[:1], tmp_path / "slide_0000.parquet"
    options = {"num_workers": 0, "overview": False, "progress": False}
    index_slides(records, tmp_path, **options)
    own, kept = NucleusTable.read(nuclei_path(path)), path.read_bytes()

    def killed(self, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TileIndex, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            index_slides(records, tmp_path, IndexSettings(min_contrast=0.2), **options)
    assert len(NucleusTable.read(nuclei_path(path))) < len(own)
    assert not path.exists()
    if planted:  # a folder as versions before left it
        path.write_bytes(kept)
    report = index_slides(records, tmp_path, **options)
    assert report.items[0].status == "done"
    pd.testing.assert_frame_equal(NucleusTable.read(nuclei_path(path)).table, own.table)
    assert index_slides(records, tmp_path, **options).items[0].status == "current"


def test_stale_index_of_a_slide_now_empty_goes(tmp_path):
    record = slide_of(tmp_path, discs(glass(), [(500, 500)], 16, (70, 60, 110)))
    assert index_slides([record], tmp_path, num_workers=0, progress=False).items[0].status == "done"
    write_pyramid(record.path, glass(seed=1), 0.25)
    assert index_slides([record], tmp_path, num_workers=0, progress=False).items[0].status == "empty"
    assert not (tmp_path / "a.parquet").exists()


def test_settings_are_checked(tmp_path):
    with pytest.raises(ValueError, match="tile_size"):
        IndexSettings(tile_size=3)
    with pytest.raises(ValueError, match="nuclei_mpp"):
        IndexSettings(nuclei_mpp=0)
    with pytest.raises(ValueError, match="min_nuclei"):
        IndexSettings(min_nuclei=-1)
    for settings, words in (
        ({"typo": 1}, "unknown setting typo of the index; there are tile_size, mpp"),
        ({"ink": {"grean": 1}}, "unknown setting ink#grean of the index; there are green"),
        ({"ink": {"green": "much"}}, "setting ink#green of the index must be a number; it is 'much'"),
        ({"ink": 5}, "setting ink must be a dictionary"),
        ({"min_nuclei": "few"}, "setting min_nuclei of the index must be a number; it is 'few'"),
        ({"mpp": float("nan")}, "setting mpp of the index must be a number; it is nan"),
        ({"max_unreadable": 5}, "setting max_unreadable must be a share"),
    ):
        with pytest.raises(SettingError, match=re.escape(words)):
            SlideIndexer("x", "y", settings=settings)
    assert SlideIndexer("x", "y", {"ink": {"green": 0.5}}).settings.ink.green == 0.5


def test_bundle_configuration(slides, tmp_path, repo_root):
    config = repo_root / "bundles/cytossl_pretrain/configs/index.json"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config)]
    table = slides.parent / "more.csv"
    table.write_text("slide_id,path\nslide_0000,slide_0000.tif\ngone,gone.tif\n")
    command += ["--slides", str(table), "--output_dir", "out", "--tile_size", "128", "--num_workers", "0"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 3, done.stderr.decode()
    assert TileIndex.read(tmp_path / "out/slide_0000.parquet").tile_size == 128
    assert "failed gone" in done.stdout.decode()


def spoilt(source, target, share):
    """A copy of a slide that has lost the middle of every n-th tile of its full resolution."""
    content = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as tiff:
        page = tiff.series[0].levels[1].pages[0]  # tiles of 0.5 um/px are read from level 1
        spans = list(zip(page.dataoffsets, page.databytecounts))
    for offset, count in spans[:: max(1, round(1 / share))]:
        content[offset + count // 3 : offset + 2 * count // 3] = bytes(2 * count // 3 - count // 3)
    target.write_bytes(content)
    return target


def test_damaged_tiles_are_left_out_and_counted(slides, indexed, tmp_path):
    record, intact = indexed[0]
    path = spoilt(record.path, tmp_path / "slide.tif", 0.2)
    damaged = SlideRecord("slide", path, None, "p")
    report = index_slides([damaged], tmp_path / "index", IndexSettings(max_unreadable=1.0), 1, progress=False)
    assert report.exit_code == 0
    index = TileIndex.read(tmp_path / "index" / "slide.parquet")
    left_out = index.meta["tiles"]["unreadable"]
    assert left_out > 0
    assert f"{left_out} damaged tiles left out" in report.items[0].message
    kept, before = (set(zip(one.table.x, one.table.y)) for one in (index, intact))
    assert kept < before
    assert len(before - kept) <= left_out
    with open_slide(path) as slide, open_slide(record.path) as original:
        assert slide.sound(index.coords, 224, 0.5).all()
        np.testing.assert_array_equal(
            slide.read_regions(index.coords, 224, 0.5), original.read_regions(index.coords, 224, 0.5)
        )


def test_a_slide_with_much_damage_fails_alone(slides, indexed, tmp_path):
    path = spoilt(indexed[0][0].path, tmp_path / "slide.tif", 0.34)
    records = [SlideRecord("bad", path, None, "p"), indexed[1][0]]
    report = index_slides(records, tmp_path / "index", num_workers=1, overview=False, progress=False)
    assert [item.status for item in report.items] == ["failed", "done"]
    assert "tiles cannot be decoded, more than max_unreadable (5%)" in report.items[0].message
    assert report.exit_code == 3


def test_images_that_itk_cannot_tell_in_words_fail_alone(slides, tmp_path):
    """16-bit strips, a palette and int8, whose errors of ITK do not unpickle, with two processes: each costs itself."""
    rng = np.random.default_rng(0)
    options = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER", "metadata": None}
    deep = rng.integers(0, 4096, (300, 300, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "strip16.tif", deep, photometric="rgb", **options)
    tifffile.imwrite(tmp_path / "int8.tif", rng.integers(0, 99, (300, 300)).astype(np.int8), **options)
    colours = rng.integers(0, 2**16, (3, 256)).astype(np.uint16)
    pixels = rng.integers(0, 256, (300, 300)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "palette.tif", pixels, photometric="palette", colormap=colours, **options)
    bad = [SlideRecord(name, tmp_path / f"{name}.tif", None, name) for name in ("strip16", "int8", "palette")]
    good = read_slide_table(slides)[:1]
    report = index_slides(bad + good, tmp_path / "out", num_workers=2, overview=False, progress=False)
    lines = {item.item: item for item in report.items}
    assert lines[good[0].slide_id].status == "done"
    assert report.exit_code == 3
    for record in bad:
        assert lines[record.slide_id].status == "failed"
        assert record.path.name in lines[record.slide_id].message
        assert "fault of the program" not in lines[record.slide_id].message
        assert "\n" not in lines[record.slide_id].message
