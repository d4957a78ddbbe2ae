"""The batched kernel against the exact path, against SciPy, and against itself one tile at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nuclei_drawings import STAINED, Disc, dice, draw
from scipy import ndimage
from skimage.io import imread

from cytossl_monai.transforms.nuclei.batch import noise_levels
from cytossl_monai.transforms.nuclei.instances import segment_instances
from cytossl_monai.transforms.nuclei.labels import _label_by_runs, label_planes
from cytossl_monai.transforms.nuclei.mask import nuclear_density, nuclei_mask
from cytossl_monai.transforms.nuclei.regions import RegionRules, noise_level

DISCS = [Disc(16, 18, 8), Disc(46, 16, 7, 0.7), Disc(32, 46, 12)]


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, np.ndarray]:
    """A tile of each stain, one without nuclei, and the true masks."""
    drawn = [draw(DISCS, stain, seed=i) for i, stain in enumerate(STAINED) if stain != "grey"]
    empty = np.clip(np.random.default_rng(0).normal(236, 3, (3, 128, 128)), 0, 255).astype(np.uint8)
    images = torch.from_numpy(np.stack([*(image for image, _ in drawn), empty]))
    return images, np.stack([*(labels > 0 for _, labels in drawn), np.zeros((128, 128), bool)])


def test_density_is_the_lesser_of_red_and_green() -> None:
    image = torch.randint(0, 256, (2, 3, 7, 5), dtype=torch.uint8)
    od = -np.log10(np.maximum(image.numpy(), 1) / 255.0)
    np.testing.assert_allclose(nuclear_density(image)[:, 0].numpy(), np.minimum(od[:, 0], od[:, 1]), atol=1e-6)
    np.testing.assert_allclose(nuclear_density(image.double() / 255), nuclear_density(image), atol=1e-5)
    assert nuclear_density(torch.full((1, 1, 2, 2), float("nan"))).eq(0).all()


def test_masks_are_right_and_do_not_depend_on_the_neighbours(batch: tuple[torch.Tensor, np.ndarray]) -> None:
    images, truth = batch
    before = images.clone()
    masks = nuclei_mask(images, 0.5)
    assert masks.dtype == torch.bool
    assert torch.equal(images, before)
    for i in range(len(images) - 1):
        assert dice(masks[i, 0].numpy(), truth[i]) > 0.9
    assert not masks[-1].any()
    alone = torch.cat([nuclei_mask(image[None], 0.5) for image in images])
    assert torch.equal(masks, alone)
    assert torch.equal(nuclei_mask(images.flip(0), 0.5), masks.flip(0))


def test_a_nucleus_in_the_first_corner_sees_no_other_tile() -> None:
    corner, _ = draw([Disc(3, 3, 9), Disc(40, 40, 8)])
    crowd, _ = draw([Disc(10 + 11 * (k % 5), 10 + 11 * (k // 5), 9) for k in range(25)], cell_um=60)
    images = torch.from_numpy(np.stack([corner, crowd, crowd]))
    assert torch.equal(nuclei_mask(images, 0.5)[:1], nuclei_mask(images[:1], 0.5))


def test_each_tile_has_its_own_scale(batch: tuple[torch.Tensor, np.ndarray]) -> None:
    image = batch[0][:1].expand(3, -1, -1, -1)
    masks = nuclei_mask(image, [0.5, 0.03, 0.4])
    assert torch.equal(masks[:1], nuclei_mask(image[:1], 0.5))
    assert not masks[1].any()
    assert torch.equal(masks[2:], nuclei_mask(image[:1], 0.4))


def test_agrees_with_the_exact_path_on_drawings(batch: tuple[torch.Tensor, np.ndarray]) -> None:
    for mpp, factor in ((0.25, 2), (0.5, 1)):
        images = batch[0][:-1].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        masks = nuclei_mask(images, mpp)
        for image, mask in zip(images, masks):
            assert dice(mask[0].numpy(), segment_instances(image, mpp, table=False).labels) > 0.9


def real_tiles(root: Path) -> dict[str, tuple[list[Path], float]]:
    """A few images of each set, and their scale."""
    return {
        "nuclei_lbc": (sorted((root / "nuclei_lbc" / "images").iterdir())[::9], 0.9),
        "nuclei": (sorted((root / "nuclei" / "images").iterdir())[::4], 0.36),
        "cric": (sorted((root / "cric" / "images").iterdir())[::60], 0.25),
        "cells": (sorted((root / "cells" / "hsil").iterdir())[:40:5], 0.25),
    }


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["nuclei_lbc", "nuclei", "cric", "cells"])
def test_agrees_with_the_exact_path_on_real_tiles(data_root: Path, name: str) -> None:
    files, mpp = real_tiles(data_root)[name]
    both = total = 0
    for file in files:
        pixels = imread(file)
        image = torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels[..., :3].transpose(2, 0, 1).copy())
        image = image[:, :512, :512]
        fast = nuclei_mask(image[None], mpp)[0, 0].numpy()
        exact = segment_instances(image, mpp, table=False).mask
        both, total = both + (fast & exact).sum(), total + fast.sum() + exact.sum()
    assert total > 0
    assert 2 * both / total >= 0.85


@pytest.mark.realdata
def test_marked_nuclei_of_real_tiles_are_found(data_root: Path) -> None:
    overlaps = []
    for file in real_tiles(data_root)["nuclei_lbc"][0]:
        truth = imread(next((data_root / "nuclei_lbc" / "masks").glob(f"{file.stem}.*")))
        truth = (truth if truth.ndim == 2 else truth[..., 0]) > 127
        image = torch.from_numpy(imread(file)[..., :3].transpose(2, 0, 1).copy())
        overlaps.append(dice(nuclei_mask(image[None], 0.9)[0, 0].numpy(), truth))
    assert np.mean(overlaps) >= 0.78


@pytest.mark.parametrize("density", [0.05, 0.4, 0.59, 0.9, 0.0, 1.0])
def test_components_are_those_of_scipy(density: float) -> None:
    mask = torch.rand(3, 33, 41, generator=torch.Generator().manual_seed(1)) < density
    for labels, count in (label_planes(mask), _label_by_runs(mask)):
        assert labels.dtype in (torch.int32, torch.int64)
        assert torch.equal(labels > 0, mask)
        offset = 0
        for plane, found in zip(mask.numpy(), labels.numpy()):
            expected, n = ndimage.label(plane)
            pairs = set(zip(expected[plane].tolist(), found[plane].tolist()))
            assert len(pairs) == n == len({f for _, f in pairs})  # one to one
            offset += n
        assert count == offset
    assert torch.equal(_label_by_runs(mask)[0], label_planes(mask)[0])  # a nucleus that is drawn is the same everywhere


def test_a_spiral_is_one_component() -> None:
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    for k in range(0, 20, 4):  # open squares, each joined to the next
        mask[0, k, k : 40 - k] = mask[0, 39 - k, k : 40 - k] = True
        mask[0, k : 40 - k, 39 - k] = True
        mask[0, k + 4 : 40 - k, k] = True
        mask[0, k + 4, k : k + 5] = True
    expected = ndimage.label(mask[0].numpy())[1]
    assert _label_by_runs(mask)[1] == expected


def test_noise_is_measured_and_agrees_with_the_exact_path() -> None:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 120)[None, :] + np.zeros((100, 1))
    planes = np.stack([ramp + rng.normal(0, s, ramp.shape) for s in (0.0, 0.01, 0.1)]).astype(np.float32)
    levels = noise_levels(torch.from_numpy(planes))
    np.testing.assert_allclose(levels[1:], [0.01, 0.1], rtol=0.08)
    np.testing.assert_allclose(levels, [noise_level(plane) for plane in planes], rtol=0.1, atol=1e-6)  # on fewer rows


def test_contrast_and_rules_are_the_callers(batch: tuple[torch.Tensor, np.ndarray]) -> None:
    images = batch[0]
    assert not nuclei_mask(images, 0.5, min_contrast=2.0).any()
    assert not nuclei_mask(images, 0.5, rules=RegionRules(min_likeness=5.0)).any()


@pytest.mark.parametrize(
    ("images", "mpp", "words"),
    [
        (torch.zeros(2, 4, 8, 8), 0.5, ["images", "(2, 4, 8, 8)"]),
        (torch.zeros(3, 8, 8), 0.5, ["images", "(3, 8, 8)"]),
        (torch.zeros(2, 3, 8, 8), [0.5] * 3, ["mpp", "3 values", "2 images"]),
        (torch.zeros(2, 3, 8, 8), 0.0, ["mpp", "0.0", "positive"]),
        (torch.zeros(2, 3, 8, 8), float("nan"), ["mpp", "nan"]),
    ],
)
def test_unusable_input_is_refused(images: torch.Tensor, mpp: object, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are looked at below
        nuclei_mask(images, mpp)
    assert all(word in str(caught.value) for word in words)


def test_empty_batches() -> None:
    assert nuclei_mask(torch.zeros(0, 3, 16, 16), 0.5).shape == (0, 1, 16, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_same_masks(batch: tuple[torch.Tensor, np.ndarray]) -> None:
    images = batch[0]
    on_gpu = nuclei_mask(images.cuda(), 0.5)
    assert on_gpu.is_cuda
    assert (on_gpu.cpu() != nuclei_mask(images, 0.5)).float().mean() < 0.01
