"""Labelled images: at the scale of training, in folds that keep an image together, without fill where it is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cytossl_monai.data import ImageFolder, LabelledImages, training_mpp
from cytossl_monai.transforms import ViewGenerator
from cytossl_monai.transforms.views.boxes import draw_boxes
from cytossl_monai.utils.errors import TableError


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Twelve frames of 80 x 60 px with four marked cells each, two of each class."""
    rng = np.random.default_rng(0)
    rows = ["image,label,x,y"]
    (tmp_path / "images").mkdir()
    for number in range(12):
        pixels = rng.integers(0, 255, (60, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        rows += [f"{number}.png,{'ab'[cell % 2]},{15 + 16 * cell},{20 + 5 * cell}" for cell in range(4)]
    (tmp_path / "cells.csv").write_text("\n".join(rows))
    return tmp_path / "cells.csv"


def test_the_field_is_as_wide_as_the_scale_says(frames: Path) -> None:
    """``size * view_mpp / mpp`` pixels of the file around the place: the scale of the files is no dead setting."""
    fine = LabelledImages(frames, size=8, mpp=0.25, view_mpp=0.5)
    pixels = np.asarray(Image.open(frames.parent / "images" / "0.png"))
    field = Image.fromarray(pixels[12:28, 7:23]).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fine.images[0].permute(1, 2, 0).numpy(), np.asarray(field))
    coarse = LabelledImages(frames, size=8, mpp=0.5, view_mpp=0.5)
    np.testing.assert_array_equal(coarse.images[0].permute(1, 2, 0).numpy(), pixels[16:24, 11:19])
    assert (fine.mpp, coarse.mpp) == (0.5, 0.5)


def test_all_cells_of_a_frame_are_in_one_fold(frames: Path) -> None:
    images = LabelledImages(frames, size=8, n_folds=4)
    assert all(len(set(images.folds[start : start + 4])) == 1 for start in range(0, 48, 4))
    blocks = LabelledImages(frames, size=8, n_folds=2, group_block=6)
    assert all(len(set(blocks.folds[start : start + 24])) == 1 for start in (0, 24))
    with pytest.raises(TableError, match="13 folds need as many groups, got 12"):
        LabelledImages(frames, size=8, n_folds=13)


def test_images_that_do_not_fill_the_field_can_be_left_out(frames: Path) -> None:
    whole = LabelledImages(frames, size=8, mpp=0.25, view_mpp=1.0, least_filled=1.0)  # 32 px: x = 15 does not fill
    assert (len(whole), whole.left_out) == (36, 12)
    assert np.exp(whole.box_features()[0]) == pytest.approx([80, 60], rel=1e-5)


def test_an_encoder_is_judged_at_the_middle_scale_of_its_views(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(tmp_path / "a.png")
    data = ImageFolder(tmp_path, size=128, mpp=0.25, fit="tile", tile_mpp=0.5)
    views = ViewGenerator(96, 48, 2, 0, global_scale=(0.2, 0.6), find_nuclei=False)
    expected = 64.0 * np.sqrt(0.4) / 96  # tiles of 64 um
    assert training_mpp(data, views) == pytest.approx(expected)
    assert training_mpp(data, views, mpp=0.7) == 0.7


REAL = torch.tensor(
    [[10, 20, 30, 50], [0, 0, 64, 64], [60, 60, 64, 64], [31, 31, 32, 32], [0, 5, 64, 9], [2, 0, 9, 64]]
).float()
"""Left, top, right, bottom of the real pixels of six tiles of 64 px."""


@pytest.mark.parametrize(("nucleus_prob", "rotate"), [(0.0, 0.0), (0.6, 0.0), (0.6, 45.0)])
@pytest.mark.parametrize("seed", range(5))
def test_boxes_lie_within_the_real_pixels(nucleus_prob: float, rotate: float, seed: int) -> None:
    drawn = torch.rand(6, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    nucleus = drawn[:, 8:] * 64, drawn[:, 7] < nucleus_prob  # nuclei everywhere, in the fill too
    boxes = draw_boxes(drawn, 64, 64, (0.1, 1.0), (0.75, 1.33), rotate=rotate, nucleus=nucleus, valid=REAL)
    reach = boxes.sides.abs().sum(2) / 2  # of a turned box as well
    assert (boxes.centre - reach >= REAL[:, :2].double() - 1e-9).all()
    assert (boxes.centre + reach <= REAL[:, 2:].double() + 1e-9).all()
    area = boxes.size.prod(1) / ((REAL[:, 2] - REAL[:, 0]) * (REAL[:, 3] - REAL[:, 1]))
    assert ((area <= 1 + 1e-9) & (area > 0)).all()
    all_of_it = torch.tensor([[0.0, 0.0, 64.0, 64.0]]).expand(6, 4)
    with_all, without = (draw_boxes(drawn, 64, 64, (0.1, 1.0), (0.75, 1.33), valid=v) for v in (all_of_it, None))
    assert torch.equal(with_all.centre, without.centre)
    with pytest.raises(ValueError, match="valid must be"):
        draw_boxes(drawn, 64, 64, (0.1, 1.0), (0.75, 1.33), valid=REAL[:2])
