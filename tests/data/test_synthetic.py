import os

import numpy as np
import pandas as pd
import pytest
import tifffile

from cytossl_monai.data.slides.write import write_pyramid
from cytossl_monai.data.synthetic.cells import CELL_CLASSES, LESION_CLASSES, Stain, render_cell
from cytossl_monai.data.synthetic.slides import SyntheticSettings, make_slide, make_slides

SIZE = 1024


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_slides(tmp_path_factory.mktemp("synthetic"), 4, SIZE, seed=3, progress=False)


def test_table_and_truth(made):
    from cytossl_monai.data.slide_table import encode_labels, read_slide_table

    records = read_slide_table(made)
    assert encode_labels(records)[0].tolist() == [0, 1, 0, 1]
    assert len({r.patient_id for r in records}) == 4
    table = pd.read_csv(made)
    assert list(table.columns[:3]) == ["slide_id", "path", "label"]
    for row in table.itertuples():
        truth = pd.read_csv(made.parent / "truth" / f"{row.slide_id}.csv")
        assert list(truth.columns[:5]) == ["x", "y", "w", "h", "class"]
        assert truth["class"].isin(LESION_CLASSES).sum() == row.n_lesion
        assert (truth["class"] != "debris").sum() == row.n_cells
        assert row.label == ("positive" if row.n_lesion > 0 else "negative")
        assert (truth[["x", "y"]].min() >= 0).all()
        assert (truth.x + truth.w).max() <= SIZE
        assert (truth.y + truth.h).max() <= SIZE
        cells = truth[truth["class"] != "debris"]
        assert (cells.nucleus_x >= cells.x).all()
        assert (cells.nucleus_x + cells.nucleus_w <= cells.x + cells.w).all()
        assert (cells[["nucleus_w", "nucleus_h"]] > 0).all().all()


def test_every_reader_sees_the_same_pixels(made):
    import openslide
    from cucim import CuImage

    path = made.parent / "slide_0000.tif"
    with tifffile.TiffFile(path) as tif:
        levels = [page.asarray() for page in tif.pages]
        tag = tif.pages[0].tags["XResolution"].value
    assert [level.shape[0] for level in levels] == [1024, 512]
    assert tag[0] / tag[1] == pytest.approx(1e4 / 0.25)
    slide = openslide.OpenSlide(str(path))
    assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
    image = CuImage(str(path))
    assert image.resolutions["level_count"] == 2
    for number, level in enumerate(levels):
        got = np.asarray(slide.read_region((0, 0), number, level.shape[1::-1]).convert("RGB"))
        assert np.abs(got.astype(int) - level).max() <= 2
        got = np.asarray(image.read_region((0, 0), level.shape[1::-1], level=number))
        assert np.abs(got.astype(int) - level).max() <= 2


def test_same_seed_same_pixels(tmp_path, made):
    again = make_slides(tmp_path / "a", 2, SIZE, seed=3, num_workers=2, progress=False)
    for name in ("slide_0001.tif", "truth/slide_0001.csv"):
        assert (again.parent / name).read_bytes() == (made.parent / name).read_bytes()
    other = make_slides(tmp_path / "b", 1, SIZE, seed=4, progress=False)
    a, b = (tifffile.imread(p.parent / "slide_0000.tif") for p in (other, made))
    assert (a != b).mean() > 0.5


def test_whole_slides_are_not_made_again(tmp_path):
    table = make_slides(tmp_path, 2, 512, seed=1, progress=False)
    first, second = (tmp_path / f"slide_{i:04d}.tif" for i in range(2))
    whole = second.read_bytes()
    os.utime(first, (1, 1))
    text = table.read_text()
    for damage in (whole[: len(whole) // 2], b"", whole[:-1000]):
        second.write_bytes(damage)
        make_slides(tmp_path, 2, 512, seed=1, progress=False)
        assert second.read_bytes() == whole
    assert first.stat().st_mtime == 1
    assert table.read_text() == text
    make_slides(tmp_path, 1, 512, seed=1, burden=0.5, progress=False)
    assert first.stat().st_mtime != 1
    (tmp_path / "truth/slide_0000.csv").unlink()
    make_slides(tmp_path, 1, 512, seed=1, burden=0.5, progress=False)
    assert (tmp_path / "truth/slide_0000.csv").is_file()


def test_nuclei_are_where_the_truth_says():
    pixels, cells = make_slide(np.random.default_rng(0), SyntheticSettings(size=1024, blur=0), None)
    density = -np.log((pixels[..., 0].astype(float) + 1) / 240)
    at = [density[c.nucleus_y + c.nucleus_h // 2, c.nucleus_x + c.nucleus_w // 2] for c in cells if c.nucleus_w]
    assert np.median(at) > 0.8
    assert np.median(density) < 0.1


def test_label_shows_in_nuclei_and_not_in_colour():
    areas, colours = {}, {}
    settings = SyntheticSettings(size=1536)
    for i in range(8):
        lesion = ("lsil", "hsil")[i // 2 % 2] if i % 2 else None
        pixels, cells = make_slide(np.random.default_rng([7, i]), settings, lesion)
        sizes = sorted(c.nucleus_w * c.nucleus_h for c in cells)
        areas.setdefault(i % 2, []).append(np.mean(sizes[-3:]))
        colours.setdefault(i % 2, []).append(pixels.reshape(-1, 3).mean(0))
    assert min(areas[1]) > max(areas[0])
    negative, positive = np.array(colours[0]), np.array(colours[1])
    spread = negative.std(0) + positive.std(0)
    assert (np.abs(negative.mean(0) - positive.mean(0)) < 1.5 * spread).all()


@pytest.mark.parametrize("kind", CELL_CLASSES)
def test_cells(kind):
    rng = np.random.default_rng(0)
    for mpp in (0.25, 0.5):
        stamps = [render_cell(kind, rng, Stain.draw(rng), mpp, focus_um=0.2) for _ in range(8)]
        for stamp in stamps:
            density = stamp.density
            assert density.dtype == np.float32
            assert np.isfinite(density).all()
            assert density.min() >= -1e-6
            edge = np.concatenate([density[0], density[-1], density[:, 0], density[:, -1]])
            assert edge.max() < 0.03, "a stamp is cut off at its border"
            assert (stamp.nucleus[2] == 0) == (kind == "debris")


def test_nuclear_to_cytoplasmic_ratio_is_raised_in_lesions():
    rng = np.random.default_rng(0)

    def ratio(kind):
        stamps = [render_cell(kind, rng, Stain()) for _ in range(24)]
        return np.median([s.nucleus[2] * s.nucleus[3] / (s.density.sum(-1) > 0.1).sum() for s in stamps])

    assert ratio("hsil") > 1.5 * ratio("parabasal")
    assert ratio("lsil") > 2.5 * ratio("intermediate") > 2.5 * ratio("superficial")


def test_turning_a_stamp_turns_its_nucleus():
    stamp = render_cell("intermediate", np.random.default_rng(2), Stain())
    x, y, w, h = stamp.nucleus
    mark = np.zeros(stamp.density.shape, np.float32)
    mark[y : y + h, x : x + w] = 1
    for quarters in range(5):
        for mirrored in (False, True):
            turned = type(stamp)(stamp.kind, mark, stamp.nucleus).turned(quarters, mirrored)
            x, y, w, h = turned.nucleus
            assert turned.density[y : y + h, x : x + w].min() == 1
            assert turned.density.sum() == mark.sum()


def test_pyramid_levels_are_means(tmp_path):
    image = np.repeat(np.repeat(np.random.default_rng(0).integers(80, 180, (5, 6, 3), np.uint8), 160, 0), 200, 1)
    path = write_pyramid(tmp_path / "a.tif", image[:777, :1111], 0.5, tile=64)
    with tifffile.TiffFile(path) as tif:
        sizes = [page.shape[:2] for page in tif.pages]
        assert sizes == [(777, 1111), (388, 555), (194, 277), (97, 138)]
        small = tif.pages[1].asarray().astype(float)
    means = image[:776, :1110].reshape(388, 2, 555, 2, 3).mean((1, 3))
    assert np.abs(small - means).mean() < 2


def test_arguments():
    with pytest.raises(ValueError, match="size"):
        SyntheticSettings(size=100)
    with pytest.raises(ValueError, match="burden"):
        SyntheticSettings(burden=2)
    with pytest.raises(ValueError, match="mpp"):
        SyntheticSettings(mpp=9)
    with pytest.raises(ValueError, match="density"):
        SyntheticSettings(density=-1)
    with pytest.raises(ValueError, match="n_slides"):
        make_slides("unused", 0)
    with pytest.raises(ValueError, match="lesion"):
        make_slide(np.random.default_rng(0), SyntheticSettings(), "superficial")
    with pytest.raises(ValueError, match="kind"):
        render_cell("x", np.random.default_rng(0), Stain())
