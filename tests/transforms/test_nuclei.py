"""Nuclei of one tile: found in every stain, not found where none are, measured right."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose
from nuclei_drawings import STAINED, Disc, dice, draw
from scipy import ndimage
from scipy.spatial import ConvexHull
from skimage.measure import regionprops

from cytossl_monai.transforms.nuclei.array import SegmentNuclei
from cytossl_monai.transforms.nuclei.dictionary import SegmentNucleid
from cytossl_monai.transforms.nuclei.instances import segment_instances
from cytossl_monai.transforms.nuclei.regions import RegionRules
from cytossl_monai.transforms.nuclei.split import split_touching
from cytossl_monai.transforms.nuclei.table import CELL_REACH, TABLE_COLUMNS, describe_nuclei, foreground

THREE = [Disc(16, 18, 8), Disc(46, 16, 6, 0.8), Disc(32, 46, 12)]


@pytest.fixture(scope="module")
def blue() -> tuple[np.ndarray, np.ndarray]:
    return draw(THREE)


@pytest.mark.parametrize("stain", STAINED)
def test_nuclei_of_every_stain(stain: str) -> None:
    image, truth = draw(THREE, stain)
    found = segment_instances(image, 0.5, table=False).labels
    assert found.max() == 3
    assert dice(found, truth) > 0.9
    assert all(len(np.unique(found[truth == k])) <= 2 for k in (1, 2, 3))  # the nucleus and perhaps a rim of 0


def test_pale_and_hyperchromatic_nuclei_in_one_tile() -> None:
    image, truth = draw([Disc(18, 20, 9, 0.25), Disc(46, 44, 9, 1.5)])
    found = segment_instances(image, 0.5, table=False).labels
    assert found.max() == 2
    assert min(dice(found == found[truth == k].max(), truth == k) for k in (1, 2)) > 0.85


def test_nuclei_under_overlapping_cytoplasm() -> None:
    image, truth = draw([Disc(24, 30, 8), Disc(40, 32, 8)], "pap_pink", cell_um=44)
    found = segment_instances(image, 0.5, table=False).labels
    assert found.max() == 2
    assert dice(found, truth) > 0.9


def blank(kind: str, sigma: float, shape: tuple[int, int, int] = (3, 160, 160)) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "random":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    level = np.full(shape, 128.0 if kind == "grey" else 236.0)
    if kind == "vignette":
        y, x = np.mgrid[-1 : 1 : shape[1] * 1j, -1 : 1 : shape[2] * 1j]
        level = 240 - 60 * (x**2 + y**2)[None] / 2 * np.ones((shape[0], 1, 1))
    if kind == "cell":  # a cell without a nucleus
        y, x = np.mgrid[: shape[1], : shape[2]]
        level[:, (y - 80) ** 2 + (x - 75) ** 2 < 60**2] = np.array([[150], [196], [200]])[: shape[0]]
    level = level + rng.normal(0, sigma, shape)
    return np.clip(level, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("method", ["instances", "mask"])
@pytest.mark.parametrize(
    ("kind", "sigma"),
    [
        ("glass", 0),
        ("glass", 2),
        ("glass", 12),
        ("glass", 40),
        ("grey", 8),
        ("vignette", 3),
        ("cell", 3),
        ("random", 0),
    ],
)
def test_nothing_is_found_where_nothing_is(kind: str, sigma: float, method: str) -> None:
    image = blank(kind, sigma)
    for mpp in (0.25, 0.5, 1.0):
        assert SegmentNuclei(mpp, method)(image).sum() == 0, (kind, sigma, mpp)
        assert SegmentNuclei(mpp, method)(image[:1]).sum() == 0, (kind, sigma, mpp, "grey image")


def test_black_and_tiny_tiles() -> None:
    for shape in ((3, 1, 1), (3, 2, 5), (1, 3, 3), (3, 1, 40)):
        for value in (0, 128, 255):
            for method in ("instances", "mask"):
                found = SegmentNuclei(0.5, method)(np.full(shape, value, np.uint8))
                assert found.shape == (1, *shape[1:])
                assert not found.any()


def test_bytes_floats_grey_and_layout_agree(blue: tuple[np.ndarray, np.ndarray]) -> None:
    image, _ = blue
    expected = segment_instances(image, 0.5, table=False).labels
    as_float = torch.from_numpy(image).double() / 255
    for other in (
        as_float,
        as_float.float().numpy(),
        torch.from_numpy(image).flip(2).flip(2),
        np.asfortranarray(image),
    ):
        np.testing.assert_array_equal(segment_instances(other, 0.5, table=False).labels, expected)
    half = segment_instances(as_float.half(), 0.5, table=False).labels
    assert dice(half, expected) > 0.99
    grey, _ = draw(THREE, "grey")
    flat = segment_instances(grey[0], 0.5, table=False).labels
    np.testing.assert_array_equal(flat, segment_instances(grey, 0.5, table=False).labels)
    np.testing.assert_array_equal(flat, segment_instances(np.repeat(grey, 3, 0), 0.5, table=False).labels)


def test_single_nan_pixels_count_as_glass(blue: tuple[np.ndarray, np.ndarray]) -> None:
    image = torch.from_numpy(blue[0]).float() / 255
    image[:, 60, 100] = float("nan")
    assert dice(segment_instances(image, 0.5, table=False).labels, blue[1]) > 0.9


def test_sizes_are_micrometres() -> None:
    for mpp in (0.25, 0.5, 1.0):
        table = segment_instances(draw([Disc(30, 32, 10)], mpp=mpp)[0], mpp).table
        assert len(table) == 1
        assert table["diameter_um"][0] == pytest.approx(10, rel=0.08)
        assert table["area_um2"][0] == pytest.approx(np.pi * 25, rel=0.16)
    image, _ = draw([Disc(32, 32, 8)], cell_um=0)
    for wrong in (0.05, 4.0):  # the same pixels as a nucleus of 0.8 and of 64 um
        for method in ("instances", "mask"):
            assert not SegmentNuclei(wrong, method)(image).any()


@pytest.mark.parametrize("gap", [6.8, 7.5, 8.0, 9.0])
def test_touching_nuclei_come_apart(gap: float) -> None:
    image, truth = draw([Disc(28, 30, 8), Disc(28 + gap, 30, 8)], mpp=0.25)
    found = segment_instances(image, 0.25, table=False).labels
    assert found.max() == 2
    assert dice(found, truth) > 0.9
    left, right = (np.bincount(found[truth == k]).argmax() for k in (1, 2))
    assert {left, right} == {1, 2}


def test_split_leaves_convex_and_ragged_regions_whole() -> None:
    y, x = np.mgrid[:80, :120]
    ellipse = (((x - 30) / 22) ** 2 + ((y - 30) / 11) ** 2 < 1).astype(np.int32)
    lobes = ((x - 80) ** 2 + (y - 50) ** 2 < 25) | ((x - 88) ** 2 + (y - 50) ** 2 < 25)  # 5 um in all: granulocyte
    labels = ellipse + 2 * lobes.astype(np.int32)
    np.testing.assert_array_equal(split_touching(labels, 0.25), labels)
    three = sum(((x - 20 - 19 * k) ** 2 + (y - 40) ** 2 < 100).astype(np.int32) for k in range(3)) > 0
    parts = split_touching(three.astype(np.int32) * 7, 0.5)
    assert sorted(np.bincount(parts.ravel())[1:][np.unique(parts)[1:] - 1] > 250) == [True] * 3
    assert 7 in parts
    np.testing.assert_array_equal(parts > 0, three)


# -- what is measured --------------------------------------------------------------------------------------------------


def test_table_against_other_sources(blue: tuple[np.ndarray, np.ndarray]) -> None:
    image, _ = blue
    found = segment_instances(image, 0.5)
    table = found.table
    assert tuple(table.columns) == TABLE_COLUMNS
    assert table["label"].tolist() == [1, 2, 3] == list(range(1, len(found) + 1))
    density = -np.log10(np.maximum(image[:2].max(0), 1) / 255)
    for row, region in zip(table.itertuples(), regionprops(found.labels)):
        ys, xs = np.nonzero(found.labels == row.label)
        assert (row.x, row.y) == pytest.approx((xs.mean(), ys.mean()))
        assert row.area_um2 == pytest.approx(len(xs) * 0.25)
        assert row.diameter_um == pytest.approx(2 * np.sqrt(len(xs) * 0.25 / np.pi))
        low, high = np.linalg.eigvalsh(np.cov(np.stack([xs, ys]), bias=True) + np.eye(2) / 12)
        assert row.eccentricity == pytest.approx(np.sqrt(1 - low / high), abs=0.02)
        assert row.eccentricity == pytest.approx(region.eccentricity)
        corners = np.concatenate([np.stack([xs + dx, ys + dy], 1) for dx in (-0.5, 0.5) for dy in (-0.5, 0.5)])
        assert row.solidity == pytest.approx(len(xs) / ConvexHull(corners).volume, abs=0.05)
        assert row.solidity == pytest.approx(region.solidity)
        assert row.mean_od == pytest.approx(density[ys, xs].mean(), abs=1e-5)


def test_nucleus_to_foreground_by_brute_force() -> None:
    image, truth = draw([Disc(20, 24, 8), Disc(44, 30, 6)], mpp=1.0)
    tile = torch.from_numpy(image)
    table = describe_nuclei(truth, 1.0, tile)
    cells = foreground(tile) | (truth > 0)
    distance = np.stack([ndimage.distance_transform_edt(truth != k) for k in (1, 2)])
    for k in (1, 2):
        own = (distance.argmin(0) == k - 1) & (distance[k - 1] <= CELL_REACH) & cells
        assert table["nucleus_to_foreground"][k - 1] == pytest.approx((truth == k).sum() / own.sum(), rel=0.03)
    assert describe_nuclei(truth, 1.0)[["mean_od", "nucleus_to_foreground"]].isna().all().all()


def test_empty_table_has_its_columns() -> None:
    found = segment_instances(np.full((3, 40, 40), 240, np.uint8), 0.5)
    assert len(found) == 0
    assert tuple(found.table.columns) == TABLE_COLUMNS
    assert found.table.empty


# -- transforms --------------------------------------------------------------------------------------------------------


def test_what_comes_out_is_of_the_kind_that_came_in(blue: tuple[np.ndarray, np.ndarray]) -> None:
    image, truth = blue
    before = image.copy()
    mask = SegmentNuclei(0.5)(image)
    assert (mask.dtype, mask.shape) == (np.uint8, (1, *truth.shape))
    assert set(np.unique(mask)) == {0, 1}
    tile = MetaTensor(torch.from_numpy(image))
    tile.affine[0, 3] = 5.0
    tile.meta["mpp"] = 0.5
    labels = SegmentNuclei(output="labels")(tile)
    assert isinstance(labels, MetaTensor)
    assert labels.dtype == torch.int32
    assert torch.equal(labels.affine, tile.affine)
    np.testing.assert_array_equal(labels.numpy()[0] > 0, mask[0] > 0)
    everything = SegmentNuclei(0.5, output="all")(image)
    np.testing.assert_array_equal(everything.mask, mask[0] > 0)
    np.testing.assert_array_equal(image, before)
    components = SegmentNuclei(0.5, "mask", "labels")(torch.from_numpy(image))
    assert components.max() == 3


def test_named_stains_find_them_too(blue: tuple[np.ndarray, np.ndarray]) -> None:
    for stain, name in (("pap_pink", "papanicolaou"), ("he", "he"), ("he", "hed")):
        image, truth = draw(THREE, stain)
        assert dice(SegmentNuclei(0.5, stains=name)(image), truth[None]) > 0.85, name
    own = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    assert dice(SegmentNuclei(0.5, stains=own)(draw(THREE, "he")[0]), blue[1][None]) > 0.85


def test_rules_are_the_callers(blue: tuple[np.ndarray, np.ndarray]) -> None:
    large_only = RegionRules(min_diameter=9.0, typical_diameter=11.0)
    assert segment_instances(blue[0], 0.5, rules=large_only).table["diameter_um"].min() > 9
    with pytest.raises(ValueError, match="must rise"):
        RegionRules(min_diameter=9.0)
    with pytest.raises(ValueError, match="positive"):
        RegionRules(level_step=0.0)


def test_dictionary_twin_and_loader(blue: tuple[np.ndarray, np.ndarray]) -> None:
    image, truth = blue
    sample = {"image": torch.from_numpy(image), "mpp": 0.5}
    both = SegmentNucleid("image", "cells", "labels", "table")(sample)
    assert set(sample) == {"image", "mpp"}
    assert isinstance(both["table"], pd.DataFrame)
    assert len(both["table"]) == 3
    np.testing.assert_array_equal(both["labels"].numpy() > 0, both["cells"].numpy() > 0)
    twin = SegmentNucleid(["image", "second"], ["m1", "m2"], mpp=0.5, allow_missing_keys=True)(sample)
    assert "m2" not in twin
    assert torch.equal(twin["m1"], both["cells"])
    transform = pickle.loads(pickle.dumps(Compose([SegmentNucleid("image")])))
    batch = next(iter(DataLoader(Dataset([sample] * 2, transform), batch_size=2, num_workers=1)))
    assert batch["nuclei"].shape == (2, 1, *truth.shape)
    assert torch.equal(torch.as_tensor(batch["nuclei"][1]), both["cells"])


# -- bad input ---------------------------------------------------------------------------------------------------------

GOOD = np.full((3, 16, 16), 200, np.uint8)


@pytest.mark.parametrize(
    ("image", "mpp", "words"),
    [
        (GOOD[:2], 0.5, ["image", "(2, 16, 16)", "(3, H, W)"]),
        (np.zeros((4, 16, 16), np.uint8), 0.5, ["image", "(4, 16, 16)"]),
        (GOOD[None], 0.5, ["image", "(1, 3, 16, 16)"]),
        (GOOD[:, :0], 0.5, ["image", "no pixels"]),
        (GOOD.astype(np.int32), 0.5, ["image", "int32", "uint8"]),
        (GOOD.astype(np.float32), 0.5, ["image", "200", "[0, 1]"]),
        (np.full((3, 16, 16), np.nan), 0.5, ["image", "NaN"]),
        (GOOD, None, ["mpp", "missing", "micrometres"]),
        (GOOD, 0, ["mpp", "0", "positive"]),
        (GOOD, -1.0, ["mpp", "-1", "positive"]),
        (GOOD, float("nan"), ["mpp", "nan"]),
        (GOOD, (0.25, 0.5), ["mpp", "square"]),
    ],
)
def test_unusable_input_is_refused(image: np.ndarray, mpp: float | None, words: list[str]) -> None:
    for method in ("instances", "mask"):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are looked at below
            SegmentNuclei(method=method)(image, mpp)
        assert all(word in str(caught.value) for word in words), caught.value
        with pytest.raises(ValueError, match="Key 'pic'") as caught:
            SegmentNucleid("pic", method=method)({"pic": image, "mpp": mpp})
        assert all(word in str(caught.value) for word in words), caught.value


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="method is 'fast'"):
        SegmentNuclei(0.5, "fast")
    with pytest.raises(ValueError, match="output is 'box'"):
        SegmentNuclei(0.5, output="box")
    with pytest.raises(ValueError, match="papanicolaou"):
        SegmentNuclei(0.5, stains="pap")
    with pytest.raises(ValueError, match="mpp is -2"):
        SegmentNuclei(-2)
    with pytest.raises(ValueError, match="same key"):
        SegmentNucleid(["a", "b"], "nuclei")
