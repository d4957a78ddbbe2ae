"""Points, instance maps and the real pixels of a tile, through array, dictionary and batched perturbation alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cytossl_monai.transforms import (
    BatchedNCP,
    NucleiCenteredPerturb,
    NucleiCenteredPerturbd,
    NucleiCentres,
    RandNucleiCenteredPerturb,
    RandNucleiCenteredPerturbd,
    ViewGenerator,
)

SIDE = 48
VALID = (10.0, 6.0, 40.0, 44.0)
RADIUS = 5.0  # pixels, at 1 um/px


def inside_valid() -> Tensor:
    """(H, W) bool, pixel by pixel."""
    real = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for y in range(SIDE):
        for x in range(SIDE):
            real[y, x] = VALID[0] <= x + 0.5 < VALID[2] and VALID[1] <= y + 0.5 < VALID[3]
    return real


def unique_tile() -> Tensor:
    """(3, H, W) float32 in which every position has a value of its own, fill told from the rest."""
    values = torch.arange(SIDE * SIDE, dtype=torch.float32).view(1, SIDE, SIDE) / (4 * SIDE * SIDE)
    return torch.where(inside_valid(), values, values + 0.7).repeat(3, 1, 1)


def array(tile: Tensor, seed: int, **given: object) -> Tensor:
    perturb = RandNucleiCenteredPerturb(mpp=1.0, keep_radius_um=RADIUS, retain_prob=0.4)
    perturb.seed = seed
    return perturb(tile, given.get("mask"), randomize=False, points=given.get("points"), valid=given.get("valid"))


def dictionary(tile: Tensor, seed: int, **given: object) -> Tensor:
    keys = {f"{key}_key": key for key in ("points", "valid") if key in given}
    perturb = RandNucleiCenteredPerturbd(
        "pic", mask_key="mask", mpp=1.0, keep_radius_um=RADIUS, retain_prob=0.4, **keys
    )
    perturb.perturb.seed = seed
    return perturb._perturb_all({"pic": tile, **given})["pic"]  # with this seed, in place of a new one


def batched(tile: Tensor, seed: int, **given: object) -> Tensor:
    mask, points, valid = given.get("mask"), given.get("points"), given.get("valid")
    nuclei = None
    if points is not None:
        nuclei = NucleiCentres.of_points([torch.as_tensor(points)])
    elif mask is not None and int(mask.max()) > 1:
        nuclei = NucleiCentres.of_instances(mask[None])
    return BatchedNCP(keep_radius_um=RADIUS, retain_prob=0.4)(
        tile[None],
        None if mask is None else mask[None] > 0,
        1.0,
        seeds=torch.tensor([seed]),
        nuclei=nuclei,
        valid=None if valid is None else torch.tensor([valid]),
    )[0]


WAYS = pytest.mark.parametrize("perturb", [array, dictionary, batched])


@WAYS
@pytest.mark.parametrize("seed", [0, 7])
def test_fill_takes_no_part_in_the_exchange(perturb: Callable[..., Tensor], seed: int) -> None:
    tile, real = unique_tile(), inside_valid()
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, 20:26, 18:25] = True
    out = perturb(tile, seed, mask=mask, valid=VALID)
    assert torch.equal(out[:, ~real], tile[:, ~real])
    assert torch.equal(out[0, real].sort().values, tile[0, real].sort().values)  # nothing came in, nothing was lost
    assert float((out != tile)[0, real].double().mean()) > 0.85
    without = perturb(tile, seed, mask=mask)
    assert float((without[0, real] > 0.6).double().mean()) > 0.2  # what it mends: fill among the real pixels
    assert torch.equal(perturb(tile, seed, mask=mask, valid=(0, 0, SIDE, SIDE)), without)


@WAYS
def test_a_mirrored_nucleus_is_none(perturb: Callable[..., Tensor]) -> None:
    """One of two is retained here: never that of the fill, in place of the real one."""
    tile = unique_tile()
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, 20:24, 2:6] = mask[0, 20:24, 20:24] = True
    for seed in range(8):
        out = perturb(tile, seed, mask=mask, valid=VALID)
        assert torch.equal(out[:, 20:24, 20:24], tile[:, 20:24, 20:24])
    mask[0, :, 10:] = False
    assert torch.equal(perturb(tile, 0, mask=mask, valid=VALID), tile)  # no nucleus is left: kept as it came


def test_with_other_ops_the_exchange_leaves_fill_out_too() -> None:
    tile, real = unique_tile(), inside_valid()
    mask = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
    mask[..., 20:26, 18:25] = True
    ops = {"exchange": {"prob": 1.0, "strength": 1.0}}
    out = BatchedNCP(ops, margin_um=0.0, feather_um=0.0)(tile[None], mask, 1.0, valid=torch.tensor([VALID]))[0]
    assert float(out[0, real].max()) < 0.6 < float(tile[0, ~real].min())


@WAYS
def test_points_and_instances_against_the_naive_disc(perturb: Callable[..., Tensor]) -> None:
    tile = unique_tile()
    points = np.array([[12.5, 30.0], [33.0, 20.5]])
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    discs = [(x - px) ** 2 + (y - py) ** 2 <= RADIUS**2 for px, py in points.tolist()]
    kept = set()
    for seed in range(40):
        out = perturb(tile, seed, points=points)
        same = (out == tile).all(0)
        whole = tuple(bool(same[disc].all()) for disc in discs)
        kept.add(whole)
        assert any(whole)
        assert float(same[~(discs[0] | discs[1])].double().mean()) < 0.05
    assert kept == {(True, False), (False, True), (True, True)}
    # Touching nuclei of an instance map stay apart: one may be retained alone. As a mask they are one nucleus.
    instances = torch.zeros(1, SIDE, SIDE, dtype=torch.int32)
    instances[0, 10:34, 8:20], instances[0, 10:34, 20:32] = 4, 9
    halves = set()
    for seed in range(40):
        same = (perturb(tile, seed, mask=instances) == tile).all(0)
        halves.add((bool(same[10:34, 8:20].all()), bool(same[10:34, 20:32].all())))
        assert bool((perturb(tile, seed, mask=instances > 0) == tile).all(0)[10:34, 8:32].all())
    assert halves == {(True, False), (False, True), (True, True)}


def test_the_fixed_transforms_take_points_and_valid() -> None:
    tile, points = unique_tile(), torch.tensor([[25.0, 25.0]])
    settings = {"keep_radius_um": RADIUS, "mpp": 1.0, "seed": 3}
    one = NucleiCenteredPerturb({"exchange": 1.0}, **settings)(tile, points=points, valid=VALID)
    data = {"pic": tile, "at": points, "real": torch.tensor(VALID)}
    two = NucleiCenteredPerturbd("pic", {"exchange": 1.0}, points_key="at", valid_key="real", **settings)(data)["pic"]
    assert torch.equal(one, two)
    assert torch.equal(one[:, ~inside_valid()], tile[:, ~inside_valid()])
    with pytest.raises(ValueError, match="valid has the shape"):
        NucleiCenteredPerturb({"exchange": 1.0}, **settings)(tile, points=points, valid=(1.0, 2.0))
    with pytest.raises(ValueError, match="box without a pixel"):
        NucleiCenteredPerturb({"exchange": 1.0}, **settings)(tile, points=points, valid=(9.0, 0.0, 9.0, 20.0))


def test_views_show_real_pixels_and_look_at_real_nuclei() -> None:
    """Views of a tile with fill: no fill shows after the exchange, and none is centred on a mirrored nucleus."""
    tile = torch.where(inside_valid(), 200, 30).to(torch.uint8).repeat(16, 3, 1, 1)
    mask = torch.zeros(16, 1, SIDE, SIDE, dtype=torch.bool)
    mask[:, :, 22:26, 2:6] = mask[:, :, 22:26, 34:38] = True
    tile[mask.expand_as(tile)] = 120
    make = ViewGenerator(
        8, n_local=0, global_scale=(0.04, 0.05), ncp=BatchedNCP(keep_radius_um=3.0), stain_prob=0.0, blur_prob=0.0
    )
    valid = torch.tensor([VALID]).expand(16, 4)
    for view in make(tile, 1.0, mask, valid=valid)["global"]:
        assert float(view.min()) > 0.4
        assert float((view[:, 0, 3:5, 3:5].mean((1, 2)) * 255).max()) < 140  # the middle shows the real nucleus
