"""What a file says of its pixels and their size is read as it is meant, or refused in a sentence."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.resolution import Resolution, tiff_resolution
from cytossl_monai.utils.errors import SlideError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (300, 320, 3), dtype=np.uint8)
TILED = {"tile": (128, 128), "photometric": "rgb", "compression": "deflate"}


def write(path: Path, pixels: np.ndarray = RGB, **options: Any) -> Path:
    settings = {**TILED, "resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER", "metadata": None, **options}
    tifffile.imwrite(path, pixels, **{key: value for key, value in settings.items() if value is not ...})
    return path


def write_rationals(path: Path, values: Any) -> None:
    """Write numerator and denominator of both resolution tags as they are."""
    with tifffile.TiffFile(path) as tiff:
        places = [tiff.pages[0].tags[name].valueoffset for name in ("XResolution", "YResolution")]
    with open(path, "r+b") as stream:
        for place, (above, below) in zip(places, values):
            stream.seek(place)
            stream.write(above.to_bytes(4, "little") + below.to_bytes(4, "little"))


def ome(path: Path, attributes: str, levels: bool = False) -> Path:
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="320" SizeY="300" '
        f'SizeC="3" SizeZ="1" SizeT="1" {attributes}><Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData/>'
        "</Pixels></Image></OME>"
    )
    with tifffile.TiffWriter(path) as tiff:
        common = {**TILED, "metadata": None}
        tiff.write(RGB, description=xml.encode(), subifds=1 if levels else 0, **common)
        if levels:
            tiff.write(RGB[::2, ::2], subfiletype=1, **common)
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.25),
        ({"resolution": (101_600, 101_600), "resolutionunit": "INCH"}, 0.25),
        ({"description": "Aperio Image Library|AppMag = 40|MPP = 0.2527"}, 0.2527),
        ({"description": "Aperio Image Library|AppMag = 40|MPP = 0,2527|x = 1"}, 0.2527),
        ({"description": "Aperio Image Library|MPP = 2.5e-1"}, 0.25),
        ({"description": "Aperio Image Library|MPP=.5"}, 0.5),
        ({"resolution": (40_000, 40_400)}, 0.24875),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "openslide", "tifffile"])
def test_resolution_as_stated(tmp_path: Path, options: dict[str, Any], expected: float, backend: Any) -> None:
    with open_slide(write(tmp_path / "slide.tif", **options), backend) as slide:
        assert slide.mpp == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', 0.25),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="0.25" PhysicalSizeYUnit="&#181;m"', 0.25),
        ('PhysicalSizeX="2.5e-4" PhysicalSizeXUnit="mm"', 0.25),
        ('PhysicalSizeX="0.5" PhysicalSizeXUnit="µm" PhysicalSizeY="0.5" PhysicalSizeYUnit="μm"', 0.5),
        ('PhysicalSizeY="2500" PhysicalSizeYUnit="&#197;"', 0.25),
    ],
)
def test_ome_xml_with_its_units(tmp_path: Path, attributes: str, expected: float) -> None:
    with open_slide(ome(tmp_path / "slide.ome.tif", attributes)) as slide:
        assert slide.mpp == pytest.approx(expected)
        np.testing.assert_array_equal(slide.read_region(7, 9, 200).transpose(1, 2, 0), RGB[9:209, 7:207])


def test_levels_in_sub_directories_are_found(tmp_path: Path) -> None:
    with open_slide(ome(tmp_path / "slide.ome.tif", 'PhysicalSizeX="0.25"', levels=True)) as slide:
        assert (slide.backend, slide.level_dimensions) == ("tifffile", [(320, 300), (160, 150)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resolution": ((0, 0), (0, 0))}, "states no resolution"),
        ({"resolution": ((0, 1), (0, 1))}, "states no resolution"),
        ({"resolution": ((1, 0), (40_000, 1))}, "states no resolution"),
        ({"resolutionunit": "NONE"}, "states no resolution"),
        ({"resolution": ..., "resolutionunit": ...}, "states no resolution"),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, "absurd resolution"),
        ({"resolution": (40_000, 20_000)}, r"not square \(0\.25 x 0\.5 um\)"),
        ({"description": "Aperio|MPP = 0"}, "states no resolution"),
        ({"description": "Aperio|MPP = 1e300"}, "absurd resolution"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "openslide", "tifffile"])
def test_resolutions_that_cannot_be_used(tmp_path: Path, options: dict[str, Any], says: str, backend: Any) -> None:
    rational = options.get("resolution")
    raw = rational if isinstance(rational, tuple) and isinstance(rational[0], tuple) else None
    path = write(tmp_path / "slide.tif", **({} if raw else options))
    if raw:
        write_rationals(path, raw)
    with pytest.raises(SlideError, match=says) as caught:
        open_slide(path, backend)
    assert "mpp column of the slide table" in str(caught.value)
    with open_slide(path, backend, mpp=0.5) as slide:  # what the table says counts
        assert (slide.mpp, slide.mpp_source) == (0.5, "argument")


@pytest.mark.parametrize("unit", ["pixel", "reference frame", "parsec"])
def test_units_that_are_no_length(tmp_path: Path, unit: str) -> None:
    path = ome(tmp_path / "slide.ome.tif", f'PhysicalSizeX="0.25" PhysicalSizeXUnit="{unit}"')
    with pytest.raises(SlideError, match=f"'{unit}', which is no unit of length"):
        open_slide(path)


@pytest.mark.parametrize(
    ("pixels", "options", "says"),
    [
        (RNG.integers(0, 255, (300, 320, 4), np.uint8), {"photometric": "separated"}, "CMYK"),
        (RNG.integers(0, 255, (300, 320, 5), np.uint8), {}, "5 channels"),
        (RGB.astype(np.uint16) * 16, {}, "16 bits"),
        (RGB.astype(np.uint16), {"tile": ...}, "16 bits"),
        (RGB.astype(np.int8), {"tile": ...}, "signed"),
        (RGB.astype(np.float32), {}, "floating-point"),
        (
            RGB[..., 0],
            {"photometric": "palette", "colormap": RNG.integers(0, 65535, (3, 256), np.uint16), "tile": ...},
            "palette",
        ),
        (RGB[..., 0], {"photometric": "miniswhite", "tile": ...}, "grey"),
        (RGB[..., :2], {"photometric": "minisblack", "planarconfig": "contig"}, "2 channels"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "openslide", "tifffile", "frame"])
def test_pixels_of_another_kind_are_refused_by_every_reader(
    tmp_path: Path, pixels: np.ndarray, options: dict[str, Any], says: str, backend: Any
) -> None:
    path = write(tmp_path / "slide.tif", pixels, **options)
    with pytest.raises(SlideError, match=says) as caught:
        open_slide(path, backend)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # comes back from a worker


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_frames_of_another_kind(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"slide.{suffix}"
    if suffix == "jpg":
        Image.fromarray(RGB).convert("CMYK").save(path, dpi=(101_600, 101_600))
    else:
        Image.fromarray(RGB[..., 0].astype(np.uint16)).save(path)
    with pytest.raises(SlideError, match="convert it to 8-bit RGB"):
        open_slide(path, mpp=0.25)


def test_a_frame_of_absurd_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "slide.png"
    Image.fromarray(RGB).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    path.write_bytes(content)
    with pytest.raises(SlideError, match=r"slide\.png is not a readable slide"):
        open_slide(path, mpp=0.25)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "slide.tif")
    with pytest.raises(SlideError, match="no file but a pipe"):
        open_slide(tmp_path / "slide.tif")


def test_imagej_says_its_unit_in_words(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, RGB, imagej=True, resolution=(4, 4), metadata={"unit": "um"})
    with tifffile.TiffFile(path) as tiff:
        assert tiff_resolution(tiff.pages[0]).mpp == pytest.approx(0.25)


def test_complaints_follow_the_name_of_the_file() -> None:
    assert Resolution(0.25, 0.25).complaint(0.05, 20) is None
    assert Resolution(0.25, 0.252).mpp == pytest.approx(0.251, abs=1e-3)
    for bad in (Resolution(), Resolution(0.0, 0.0), Resolution(-1.0, -1.0), Resolution(float("nan"), 0.25)):
        assert bad.complaint(0.05, 20) == "states no resolution"
        assert bad.mpp is None
    assert "absurd" in str(Resolution(1e200, 1e200).complaint(0.05, 20))
