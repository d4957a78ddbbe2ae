"""Real slides: the libraries agree, the broken ones are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.utils.errors import SlideError

pytestmark = pytest.mark.realdata
SLIDES = {"csf-pap.tif": None, "cmu-1-small-region.svs": None, "tcga-cr-7395-01a-01-ts1.svs": 0.25}


@pytest.mark.parametrize("name", SLIDES)
def test_libraries_agree_within_two_grey_levels(data_root: Path, name: str) -> None:
    path = data_root / "wsi" / name
    rng = np.random.default_rng(0)
    with (
        open_slide(path, "cucim", SLIDES[name]) as cucim,
        open_slide(path, "openslide", SLIDES[name]) as openslide,
        open_slide(path, "tifffile", SLIDES[name]) as tiff,
    ):
        assert cucim.level_dimensions == openslide.level_dimensions == tiff.level_dimensions
        assert cucim.mpp == pytest.approx(openslide.mpp, rel=1e-4) == tiff.mpp
        corners = rng.integers((-50, -50), (cucim.width - 100, cucim.height - 100), (12, 2))
        for mpp in (None, cucim.mpp * 1.7, cucim.mpp * 0.6):
            fast = cucim.read_regions(corners, 150, mpp, num_workers=2).astype(int)
            assert np.abs(fast - openslide.read_regions(corners, 150, mpp)).max() <= 2
            assert np.abs(fast - tiff.read_regions(corners, 150, mpp)).max() <= 2
        for level, downsample in enumerate(cucim.level_downsamples[1:], 1):
            # OpenSlide interpolates where a level's pixel lies between two of level 0; the other two do not.
            mpp = cucim.mpp * downsample
            fast = cucim.read_regions(corners, 150, mpp).astype(int)
            assert cucim.best_level(mpp) == level
            assert np.abs(fast - tiff.read_regions(corners, 150, mpp)).max() <= 2
            assert np.abs(fast - openslide.read_regions(corners, 150, mpp)).mean() <= 4


def test_broken_files_are_named(data_root: Path) -> None:
    for name in ("broken.svs", "unreadable.svs"):
        with pytest.raises(SlideError, match=f"{name} is not a readable slide"):
            open_slide(data_root / "wsi" / name)
    with pytest.raises(SlideError, match="mpp column"):
        open_slide(data_root / "wsi" / "tcga-cr-7395-01a-01-ts1.svs")


def test_a_photograph_is_a_slide_of_one_level(data_root: Path) -> None:
    path = next((data_root / "cric" / "images").glob("*.jpg"))
    with open_slide(path, mpp=0.25) as slide:
        assert slide.backend == "frame"
        assert slide.read_region(100, 100, 224, 0.5).std() > 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_decodes_the_same_pixels(data_root: Path) -> None:
    pytest.importorskip("cupy")
    path = data_root / "wsi" / "csf-pap.tif"
    corners = np.array([(9000, 9000), (-100, 40), (27700, 28400), (14001, 15003)])
    with open_slide(path, "cucim") as host, open_slide(path, "cucim", device="cuda") as device:
        for mpp in (None, 0.5, 1.0):
            tiles = device.read_regions(corners, 224, mpp, num_workers=2)
            assert tiles.is_cuda
            assert np.abs(tiles.cpu().numpy().astype(int) - host.read_regions(corners, 224, mpp)).max() <= 2
