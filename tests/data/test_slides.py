"""Slides made here, whose every pixel is known: regions, resolutions, borders, processes, bad files."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.pool import SlidePool
from cytossl_monai.data.slides.readers.base import level_downsamples
from cytossl_monai.data.slides.resample import axis_weights, resample, window_size
from cytossl_monai.data.slides.slide import Slide, glass_colour
from cytossl_monai.utils.errors import SlideError

BACKENDS = ["cucim", "openslide", "tifffile"]
GLASS = (240, 236, 230)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random blobs on glass, (h, w, 3) uint8: something to see at every scale."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), GLASS, np.float32)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(60):
        y, x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(4, 40)
        blob = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * radius**2))
        image -= blob[..., None] * rng.uniform(20, 120, 3).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def halve(image: np.ndarray) -> np.ndarray:
    h, w = (s // 2 * 2 for s in image.shape[:2])
    return np.rint(image[:h, :w].reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3))).astype(np.uint8)


def write_pyramid(path: Path, image: np.ndarray, levels: int = 3, mpp: float | None = 0.25) -> Path:
    """Lossless tiled TIFF with reduced pages."""
    resolution = None if mpp is None else (1e4 / mpp, 1e4 / mpp)
    common = {"tile": (128, 128), "photometric": "rgb", "compression": "deflate", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            scaled = None if resolution is None else tuple(r / 2**level for r in resolution)
            unit = None if resolution is None else "CENTIMETER"
            tiff.write(image, subfiletype=int(level > 0), resolution=scaled, resolutionunit=unit, **common)
            image = halve(image)
    return path


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return picture(901, 1203)


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory, image: np.ndarray) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "slide.tif", image)


@pytest.mark.parametrize("backend", BACKENDS)
def test_native_regions_are_the_pixels_themselves(slide_file: Path, image: np.ndarray, backend: str) -> None:
    with open_slide(slide_file, backend) as slide:
        assert (slide.width, slide.height) == (1203, 901)
        assert slide.level_downsamples == [1.0, 2.0, 4.0]
        assert slide.mpp == pytest.approx(0.25, rel=1e-4)
        assert slide.mpp_source == "file"
        places = np.array([(0, 0), (17, 33), (500, 301), (1203 - 90, 901 - 70)])
        batch = slide.read_regions(places, (90, 70))
        assert batch.shape == (4, 3, 70, 90)
        for (x, y), region in zip(places, batch):
            np.testing.assert_array_equal(region, image[y : y + 70, x : x + 90].transpose(2, 0, 1))
            np.testing.assert_array_equal(region, slide.read_region(x, y, (90, 70)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_outside_is_the_slides_own_glass(slide_file: Path, image: np.ndarray, backend: str) -> None:
    padded = np.pad(image, ((300, 300), (300, 300), (0, 0)), constant_values=0)
    inside = np.pad(np.ones(image.shape[:2], bool), 300)
    with open_slide(slide_file, backend) as slide:
        glass = slide.glass
        np.testing.assert_allclose(glass, GLASS, atol=2)
        for x, y in [(-40, -25), (1203 - 30, 901 - 50), (-200, 300), (-100, -100), (1250, 950)]:
            region = slide.read_region(x, y, 96).transpose(1, 2, 0)
            window = (slice(y + 300, y + 396), slice(x + 300, x + 396))
            seen = inside[window]
            np.testing.assert_array_equal(region[seen], padded[window][seen])
            assert (region[~seen] == glass).all()


def test_a_region_larger_than_the_slide_holds_it_all(tmp_path: Path) -> None:
    small = picture(150, 140)
    path = write_pyramid(tmp_path / "small.tif", small, levels=1)
    for backend in BACKENDS:
        with open_slide(path, backend) as slide:
            region = slide.read_region(-10, -20, 200).transpose(1, 2, 0)
            np.testing.assert_array_equal(region[20:170, 10:150], small)


def naive_area(image: np.ndarray, x: float, y: float, size: int, scale: float) -> np.ndarray:
    """Every output pixel is the integral of the piecewise constant image over its own rectangle, by 2-D prefix sums."""
    table = np.pad(image.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))

    def integral(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        r0, c0 = np.floor(row).astype(int), np.floor(column).astype(int)
        fr, fc = (row - r0)[:, None, None], (column - c0)[None, :, None]
        r1, c1 = np.minimum(r0 + 1, image.shape[0]), np.minimum(c0 + 1, image.shape[1])
        low = table[r0][:, c0] * (1 - fc) + table[r0][:, c1] * fc
        high = table[r1][:, c0] * (1 - fc) + table[r1][:, c1] * fc
        return low * (1 - fr) + high * fr

    edges = np.arange(size + 1) * scale
    total = integral(y + edges, x + edges)
    return np.diff(np.diff(total, axis=0), axis=1) / scale**2


@pytest.mark.parametrize("mpp", [0.25 * 1.3, 0.25 * 1.9, 0.25 * 2.5, 0.25 * 3.37])
@pytest.mark.parametrize(("x", "y"), [(0, 0), (101, 57), (333, 210)])
def test_any_resolution_is_area_averaging_of_the_full_level(
    tmp_path: Path, image: np.ndarray, mpp: float, x: int, y: int
) -> None:
    one_level = write_pyramid(tmp_path / "one.tif", image, levels=1)
    with open_slide(one_level) as slide:
        scale = mpp / slide.mpp
        region = slide.read_region(x, y, 120, mpp).transpose(1, 2, 0).astype(float)
    np.testing.assert_allclose(region, naive_area(image, x, y, 120, scale), atol=0.51)


@pytest.mark.parametrize("mpp", [0.5, 0.505, 0.75, 1.0, 1.01, 1.7])
def test_coarser_levels_show_the_same_place(slide_file: Path, image: np.ndarray, mpp: float) -> None:
    """A pyramid is read from its best level; what comes is what averaging the full level gives, without a shift."""
    with open_slide(slide_file) as slide:
        assert slide.best_level(mpp) == (1 if mpp < 0.98 else 2)
        region = slide.read_region(100, 56, 120, mpp).transpose(1, 2, 0).astype(float)
        reference = naive_area(image, 100, 56, 120, mpp / slide.mpp)
    error = np.abs(region - reference)
    assert error.mean() < 0.6
    shifted = np.abs(region[:, 1:] - reference[:, :-1]).mean()
    assert error.mean() < shifted


def test_finer_than_the_slide_is_interpolated(slide_file: Path, image: np.ndarray) -> None:
    with open_slide(slide_file) as slide:
        region = slide.read_region(200, 200, 200, slide.mpp / 2).transpose(1, 2, 0).astype(float)
    back = region.reshape(100, 2, 100, 2, 3).mean((1, 3))
    assert np.abs(back - image[200:300, 200:300]).mean() < 0.6


@pytest.mark.parametrize("scale", [0.3, 0.999, 1.0, 1.01, 2.0, 2.7, 13.4])
@pytest.mark.parametrize("offset", [2.0, 2.25, 2.999])
def test_weights_keep_brightness_and_place(scale: float, offset: float) -> None:
    window = int(np.ceil(40 * scale)) + 6
    weights = axis_weights(40, scale, offset, window).toarray()
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    # A pixel that is cut counts with its own centre, not with that of the part: off by an eighth of a pixel at most.
    centres = weights @ (np.arange(window) + 0.5)
    np.testing.assert_allclose(centres, offset + scale * (np.arange(40) + 0.5), atol=0.126 if scale > 1 else 2e-3)


def test_thumbnail_of_a_slide_without_pyramid_is_read_in_parts(
    tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pyramid(tmp_path / "one.tif", image, levels=1)
    with open_slide(path) as slide:
        whole = slide.thumbnail(100)
        monkeypatch.setattr("cytossl_monai.data.slides.reading._MAX_SOURCE_PIXELS", 20_000)
        parts = slide.thumbnail(100)
    assert whole.shape == parts.shape == (3, 74, 100)
    np.testing.assert_allclose(whole.astype(int), parts, atol=1)


def test_glass_is_the_bright_mode() -> None:
    image = np.full((3, 100, 100), 0, np.uint8)
    image[:, :40] = np.array([228, 231, 219])[:, None, None]
    image[:, 40:45] = 255
    np.testing.assert_array_equal(glass_colour(image), [228, 231, 219])
    dark = np.full((3, 20, 20), 30, np.uint8)
    np.testing.assert_array_equal(glass_colour(dark), [30, 30, 30])


def test_halving_with_a_dropped_row_is_exactly_two() -> None:
    assert level_downsamples([(27740, 28423), (13870, 14211), (433, 444)]) == [1.0, 2.0, 64.0]
    assert level_downsamples([(1000, 1000), (400, 400)]) == [1.0, 2.5]


# -- processes ------------------------------------------------------------------------------------------------------


def _read_there(slide: Slide) -> np.ndarray:
    return np.asarray(slide.read_regions([(10, 20), (300, 200)], 64))


def _read_from_pool(args: tuple[SlidePool, Path]) -> np.ndarray:
    pool, path = args
    return np.asarray(pool.get(path).read_regions([(10, 20), (300, 200)], 64))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_slides_and_pools_work_in_other_processes(slide_file: Path, backend: str, method: str) -> None:
    if method == "spawn" and backend != "cucim":
        pytest.skip("one spawned process is enough: starting it takes seconds")
    pool = SlidePool(2, backend)
    slide = pool.get(slide_file)
    here = slide.read_regions([(10, 20), (300, 200)], 64, num_workers=2)
    with multiprocessing.get_context(method).Pool(1) as workers:
        np.testing.assert_array_equal(workers.apply(_read_there, (slide,)), here)
        np.testing.assert_array_equal(workers.apply(_read_from_pool, ((pool, slide_file),)), here)
    np.testing.assert_array_equal(slide.read_regions([(10, 20), (300, 200)], 64), here)
    pool.close()


def _fork_inherited(slide: Slide, queue: multiprocessing.Queue[bytes]) -> None:
    queue.put(np.asarray(slide.read_region(5, 5, 32)).tobytes())
    slide.close()


def test_a_forked_child_closes_its_own_handle_only(slide_file: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with open_slide(slide_file) as slide:
        here = slide.read_region(5, 5, 32)
        child = context.Process(target=_fork_inherited, args=(slide, queue))
        child.start()
        there = queue.get(timeout=60)
        child.join(60)
        assert child.exitcode == 0
        assert there == here.tobytes()
        np.testing.assert_array_equal(slide.read_region(5, 5, 32), here)


def test_pickled_slide_reads_the_same(slide_file: Path) -> None:
    with open_slide(slide_file, mpp=0.3) as slide:
        here = slide.read_region(-5, 5, 32, 0.7)
        with pickle.loads(pickle.dumps(slide)) as copy:
            assert (copy.mpp, copy.mpp_source) == (0.3, "argument")
            np.testing.assert_array_equal(copy.read_region(-5, 5, 32, 0.7), here)


def test_pool_closes_what_it_evicts(tmp_path: Path) -> None:
    paths = [write_pyramid(tmp_path / f"{i}.tif", picture(200, 200, i), 1) for i in range(3)]
    with SlidePool(2) as pool:
        first = pool.get(paths[0])
        second = pool.get(paths[1])
        assert pool.get(paths[0]) is first
        pool.get(paths[2])
        assert second.closed
        assert not first.closed
        assert len(pool) == 2
    assert first.closed
    with pytest.raises(SlideError, match="closed"):
        first.read_region(0, 0, 8)


# -- bad input ------------------------------------------------------------------------------------------------------


def test_missing_and_absurd_resolution_name_the_column(tmp_path: Path) -> None:
    silent = write_pyramid(tmp_path / "silent.tif", picture(200, 200), 1, mpp=None)
    absurd = write_pyramid(tmp_path / "absurd.tif", picture(200, 200), 1, mpp=352.8)
    with pytest.raises(SlideError, match=r"silent.*no resolution.*mpp column"):
        open_slide(silent)
    with pytest.raises(SlideError, match=r"absurd.*352\.8.*mpp column"):
        open_slide(absurd)
    with pytest.raises(SlideError, match="mpp column"):
        open_slide(silent, mpp=0.0)
    with open_slide(absurd, mpp=0.25) as slide:
        assert slide.mpp == 0.25


def test_truncated_files_are_refused(tmp_path: Path, slide_file: Path) -> None:
    whole = slide_file.read_bytes()
    for share in (0.3, 0.7, 0.95):
        cut = tmp_path / f"cut{share}.tif"
        cut.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(SlideError, match=r"cut.*truncated|cut.*not a readable"):
            open_slide(cut)


def test_damage_within_is_found_by_the_second_reader(tmp_path: Path) -> None:
    """cuCIM returns garbage for a damaged JPEG tile and says nothing."""
    image = picture(256, 256)
    path = tmp_path / "damaged.tif"
    tifffile.imwrite(
        path,
        image,
        tile=(256, 256),
        photometric="rgb",
        compression="jpeg",
        resolution=(4e4, 4e4),
        resolutionunit="CENTIMETER",
    )
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    content = bytearray(path.read_bytes())
    content[offset + 4 : offset + count] = bytes(count - 4)
    path.write_bytes(content)
    with pytest.raises(SlideError, match="damaged"):
        open_slide(path)


@pytest.mark.parametrize("name", ["text.svs", "text.tif", "text.xyz", "empty.svs", "absent.svs"])
def test_what_is_no_slide_is_one_clear_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if not name.startswith("absent"):
        path.write_text("" if name.startswith("empty") else "not an image" * 50)
    with pytest.raises(SlideError, match=name) as caught:
        open_slide(path)
    assert "\n" not in str(caught.value)


def test_arguments_are_checked(slide_file: Path) -> None:
    with pytest.raises(ValueError, match="backend"):
        open_slide(slide_file, "bioformats")  # type: ignore[arg-type]
    with open_slide(slide_file) as slide:
        for bad in ({"size": 0}, {"size": 10, "mpp": -1.0}, {"size": 10, "mpp": float("nan")}):
            with pytest.raises(ValueError, match="must be"):
                slide.read_regions([(0, 0)], **bad)
        with pytest.raises(ValueError, match="locations"):
            slide.read_regions([(0, 0, 0)], 8)
        assert slide.read_regions([], 8).shape == (0, 3, 8, 8)


# -- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "jpg"])
def test_frames_come_as_a_slide_of_one_level(tmp_path: Path, suffix: str) -> None:
    image = picture(120, 200)
    path = tmp_path / f"frame.{suffix}"
    Image.fromarray(image).save(path)
    with open_slide(path, mpp=0.25) as slide:
        assert slide.backend == "frame"
        assert slide.level_dimensions == [(200, 120)]
        region = slide.read_region(30, 40, (100, 60)).transpose(1, 2, 0)
    np.testing.assert_allclose(region.astype(int), image[40:100, 30:130], atol=12 if suffix == "jpg" else 0)


def test_a_grey_frame_gets_three_channels(tmp_path: Path) -> None:
    grey = picture(64, 80)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    with open_slide(tmp_path / "grey.png", mpp=0.25) as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, (80, 64)), np.stack([grey] * 3))


def test_a_deep_frame_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(SlideError, match="8-bit RGB"):
        open_slide(tmp_path / "deep.png", mpp=0.25)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_a_backend_are_its_regions_in_order(slide_file: Path, image: np.ndarray, backend: str) -> None:
    """What is converted piece by piece is what one call returns, and what the image holds; outside is painted over."""
    corners = np.array([(3, 5), (64, 90), (10, 200), (120, 7)], np.int64)
    with open_slide(slide_file, backend=backend) as slide:
        handle, fill = slide._open_handle(), np.full(3, 255, np.uint8)
        for workers in (0, 2):
            blocks = [block.copy() for block in handle.read_blocks(0, corners, (32, 24), fill, workers)]
            assert np.array_equal(np.concatenate(blocks), handle.read(0, corners, (32, 24), fill, workers))
        together = slide.read_regions([*corners.tolist(), (-20, -20)], (32, 24))
        for region, (x, y) in zip(together, corners):
            assert np.array_equal(region, slide.read_region(int(x), int(y), (32, 24)))
        assert (together[-1][:, :20, :20] == slide.glass[:, None, None]).all()


@pytest.mark.parametrize("scale", [0.6, 1.46, 3.0])
def test_resampling_is_the_product_with_the_weights_of_both_axes(scale: float) -> None:
    rng = np.random.default_rng(0)
    width, height, starts = 20, 13, np.array([(4.25, 7.5), (0.0, 3.75)])
    shape = (2, window_size(height, scale), window_size(width, scale), 3)
    windows = rng.integers(0, 256, shape).astype(np.uint8)
    out = np.empty((2, 3, height, width), np.uint8)
    assert resample(windows, starts, (width, height), scale, out) is out
    for window, (x, y), result in zip(windows, starts - np.floor(starts) + 2, out):
        rows = axis_weights(height, scale, y, shape[1]).toarray().astype(np.float64)
        columns = axis_weights(width, scale, x, shape[2]).toarray().astype(np.float64)
        expected = np.clip(np.rint(np.einsum("jh,hwc,iw->cji", rows, window.astype(np.float64), columns)), 0, 255)
        assert np.abs(result.astype(int) - expected).max() <= 1
        assert np.mean(result == expected) > 0.97  # float32 against float64: exact halves may fall either way
