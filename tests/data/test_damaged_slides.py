"""Slides with damage of a known place and kind: what can be decoded is read, the rest is told, nothing crashes."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.readers.cucim import CuCIMBackend
from cytossl_monai.data.slides.tiff_tiles import jpeg_frame, read_tiff_tiles
from cytossl_monai.data.slides.write import write_pyramid
from cytossl_monai.utils.errors import SlideError

SIDE = 2048
TILE = 256


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(60, 250, (SIDE // 16, SIDE // 16, 3), dtype=np.uint8))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def whole(image: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("whole") / "slide.tif", image, 0.25)


def spoil(source: Path, target: Path, kind: str, tiles: list[int], seed: int = 0) -> Path:
    """A copy whose level-0 tiles are damaged."""
    content, rng = bytearray(source.read_bytes()), np.random.default_rng(seed)
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages[0]
        spans = [(page.dataoffsets[i], page.databytecounts[i]) for i in tiles]
    for offset, count in spans:
        start, length = offset + count // 3, count // 2
        if kind == "zeros":
            content[start : start + length] = bytes(length)
        elif kind == "noise":
            content[start : start + length] = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif kind == "header":
            content[offset : offset + 64] = bytes(64)
        elif kind == "frame":  # a frame larger than its tile: cuCIM writes beyond its buffer
            place = content.index(b"\xff\xc0", offset, offset + count)
            content[place + 5 : place + 9] = b"\x08\x00\x08\x00"
        else:
            raise ValueError(kind)
    target.write_bytes(content)
    return target


def places() -> np.ndarray:
    columns, rows = np.meshgrid(np.arange(SIDE // TILE), np.arange(SIDE // TILE))
    return np.stack([columns.ravel(), rows.ravel()], 1) * TILE


@pytest.mark.parametrize("kind", ["zeros", "noise", "header", "frame"])
def test_damaged_tiles_are_told_and_the_others_are_read(whole: Path, tmp_path: Path, kind: str) -> None:
    tiles = [0, 9, 27, 36, 63]  # the first, the middle and the last are where the opening looks
    path = spoil(whole, tmp_path / "slide.tif", kind, tiles)
    with open_slide(whole) as intact, open_slide(path) as slide:
        expected = intact.read_regions(places(), TILE)
        assert intact.sound(places(), TILE).all()
        images, sound = slide.read_sound(places(), TILE)
        assert np.flatnonzero(~sound).tolist() == tiles
        np.testing.assert_array_equal(images[sound], expected[sound])
        assert (images[~sound] == slide.glass[:, None, None]).all()
        np.testing.assert_array_equal(slide.sound(places(), TILE, num_workers=4), sound)
        # What only touches a damaged tile is not sound either.
        assert slide.sound(np.array([[TILE * 2 - 10, TILE + 5], [TILE * 2, TILE]]), 64).tolist() == [False, True]
        assert slide.thumbnail(512).shape == (3, 512, 512)
        if kind in ("header", "frame"):  # seen without decoding: never a picture of something else
            with pytest.raises(SlideError, match=r"slide\.tif is damaged"):
                slide.read_region(TILE, TILE, TILE)
            overview = slide.read_regions(places(), TILE, damaged="glass")
            np.testing.assert_array_equal(overview[sound], expected[sound])


def test_one_damaged_level_of_low_power_costs_no_tile(whole: Path, tmp_path: Path) -> None:
    content = bytearray(whole.read_bytes())
    with tifffile.TiffFile(whole) as tiff:
        page = tiff.series[0].levels[1].pages[0]
        offset = page.dataoffsets[0]
    content[offset : offset + 32] = bytes(32)
    (tmp_path / "slide.tif").write_bytes(content)
    with open_slide(tmp_path / "slide.tif") as slide:
        assert slide.sound(places(), TILE).all()
        assert not slide.sound(places()[:1], 64, 0.5).any()


def test_a_slide_without_a_sound_place_is_refused(whole: Path, tmp_path: Path) -> None:
    path = spoil(whole, tmp_path / "slide.tif", "noise", list(range(64)))
    with pytest.raises(SlideError, match=r"slide\.tif is not a readable slide"):
        open_slide(path)


def test_a_frame_larger_than_its_tile_kills_nothing(whole: Path, tmp_path: Path) -> None:
    """In a process of its own: cuCIM alone ends it with a segmentation fault."""
    path = spoil(whole, tmp_path / "slide.tif", "frame", [10])
    code = (
        "from cytossl_monai.data.slides.open import open_slide\n"
        f"slide = open_slide({str(path)!r})\n"
        "try:\n    slide.read_region(512, 256, 256)\nexcept ValueError as error:\n    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "its JPEG frame is 2048 x 2048 pixels, the tile 256 x 256" in done.stdout


@pytest.mark.parametrize("compression", ["deflate", "zstd", "lzw"])
def test_compressions_that_cucim_does_not_survive_go_to_the_next_reader(
    image: np.ndarray, tmp_path: Path, compression: str
) -> None:
    path = tmp_path / "slide.tif"
    options = {"tile": (256, 256), "photometric": "rgb", "compression": compression, "predictor": 2}
    tifffile.imwrite(path, image, resolution=(40000, 40000), resolutionunit="CENTIMETER", **options)
    tiles = read_tiff_tiles(path)
    assert (compression == "lzw") == (tiles.cucim_refusal is None)
    with open_slide(path) as slide:
        assert (slide.backend == "cucim") == (compression == "lzw" and CuCIMBackend.name == slide.backend)
        np.testing.assert_array_equal(slide.read_region(300, 200, 400).transpose(1, 2, 0), image[200:600, 300:700])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ImageWidth": 0}, "contradicts itself|not a readable"),
        ({"ImageWidth": 1_000_000}, "contradicts itself"),
        ({"ImageLength": 4_000_000_000}, "contradicts itself"),
        ({"TileWidth": 1_048_576}, "contradicts itself"),
    ],
)
def test_tables_that_cannot_be_true_are_refused(whole: Path, tmp_path: Path, change: dict, says: str) -> None:
    path = tmp_path / "slide.tif"
    path.write_bytes(whole.read_bytes())
    for name, value in change.items():
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            tag = tiff.pages[0].tags[name]
            place, size = tag.valueoffset, 2 if tag.dtype == 3 else 4
            whole_value = value if size == 4 else min(value, 65535)
        with open(path, "r+b") as stream:
            stream.seek(place)
            stream.write(int(whole_value).to_bytes(size, "little"))
    with pytest.raises(SlideError, match=says):
        open_slide(path)


def test_frames_are_read_like_libjpeg_reads_them() -> None:
    import simplejpeg

    rng = np.random.default_rng(0)
    for height, width, colour in ((16, 16, "RGB"), (33, 257, "RGB"), (1, 9, "GRAY")):
        pixels = rng.integers(0, 256, (height, width, 3 if colour == "RGB" else 1), dtype=np.uint8)
        data = simplejpeg.encode_jpeg(pixels, colorspace=colour)
        assert jpeg_frame(data) == (width, height, pixels.shape[2], 8)
        assert simplejpeg.decode_jpeg_header(data)[:2] == (height, width)
        for cut in range(0, len(data), 7):
            jpeg_frame(data[:cut])  # never an error
    assert jpeg_frame(b"\xff\xd8" + b"\xff" * 50) is None
    assert jpeg_frame(b"\xff\xd8\xff\xe0\x00\x00" + bytes(50)) is None


FRAMES = {
    "baseline": ("RGB", {}),
    "progressive": ("RGB", {"progressive": True}),
    "every pixel its colour": ("RGB", {"subsampling": 0}),
    "restarts": ("RGB", {"restart_marker_blocks": 4}),
    "grey": ("L", {}),
    "grey progressive": ("L", {"progressive": True}),
}


def jpeg(image: np.ndarray, kind: str) -> bytes:
    mode, options = FRAMES[kind]
    buffer = io.BytesIO()
    Image.fromarray(image[:400, :500]).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FRAMES)
def test_whole_jpeg_frames_are_read(image: np.ndarray, tmp_path: Path, kind: str) -> None:
    for name, behind in (("whole.jpg", b""), ("more.jpeg", b"what some cameras write behind the image")):
        (tmp_path / name).write_bytes(jpeg(image, kind) + behind)
        with open_slide(tmp_path / name, mpp=0.25) as slide:
            assert slide.read_region(0, 0, (500, 400)).std() > 20


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize("damage", ["half", "third", "last bytes", "noise"])
def test_jpeg_frames_that_are_cut_or_damaged_are_refused(
    image: np.ndarray, tmp_path: Path, kind: str, damage: str
) -> None:
    """ITK reads each of them, with grey or noise where nothing can be decoded."""
    data, path = jpeg(image, kind), tmp_path / "frame.jpg"
    middle = len(data) // 2
    noise = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8).tobytes()
    cuts = {
        "half": data[:middle],
        "third": data[: len(data) // 3],
        "last bytes": data[:-60],
        "noise": data[:middle] + noise + data[middle + len(noise) :],
    }
    path.write_bytes(cuts[damage])
    with pytest.raises(SlideError, match=r"frame\.jpg .*its JPEG image is cut short or damaged \(.+\)"):
        open_slide(path, mpp=0.25)
