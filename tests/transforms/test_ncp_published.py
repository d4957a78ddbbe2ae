"""Nuclei-Centered Perturbation as published, against loops over nuclei and pixels."""

from __future__ import annotations

import pytest
import torch

from cytossl_monai.transforms.ncp.batched import BatchedNCP
from cytossl_monai.transforms.ncp.exchange import exchange_outside, kept_discs, retained_nuclei
from cytossl_monai.transforms.nuclei.centres import NucleiCentres
from cytossl_monai.transforms.views.generator import ViewGenerator

SIZE = (60, 52)


def masks_of(batch: int = 3) -> torch.Tensor:
    """Three nuclei, one of them at the border; none; one."""
    masks = torch.zeros(batch, 1, *SIZE, dtype=torch.bool)
    masks[0, 0, 5:10, 5:12] = masks[0, 0, 30:36, 20:27] = masks[0, 0, 57:60, 48:52] = True
    masks[2:, 0, 40:50, 30:36] = True
    return masks


def unique_tiles(batch: int = 3) -> torch.Tensor:
    """Every pixel of every channel has a value of its own."""
    return torch.arange(batch * 3 * SIZE[0] * SIZE[1], dtype=torch.float64).view(batch, 3, *SIZE)


def test_centres_are_those_of_the_parts() -> None:
    nuclei = NucleiCentres.of_masks(masks_of())
    assert nuclei.counts().tolist() == [3, 0, 1]
    wanted = [[8.5, 7.5], [23.5, 33.0], [50.0, 58.5], [33.0, 45.0]]
    torch.testing.assert_close(nuclei.xy, torch.tensor(wanted, dtype=torch.float64))
    some = nuclei.of(torch.tensor([2, 0]))
    torch.testing.assert_close(some.xy, nuclei.xy[[3, 0, 1, 2]])
    for row, (x, y) in enumerate(some.xy.tolist()):
        assert int(some.labels[some.sample[row], int(y), int(x)]) == row + 1


def test_touching_instances_stay_apart() -> None:
    instances = torch.zeros(2, 1, 8, 8, dtype=torch.int32)
    instances[0, 0, :, :4], instances[0, 0, :, 4:] = 9, 2
    instances[1, 0, 2:4, 2:4] = 9
    nuclei = NucleiCentres.of_instances(instances)
    assert nuclei.counts().tolist() == [2, 1]
    assert {tuple(xy) for xy in nuclei.xy.tolist()} == {(2.0, 4.0), (6.0, 4.0), (3.0, 3.0)}
    for row in range(3):
        assert int((nuclei.labels[nuclei.sample[row]] == row + 1).sum()) == (4 if nuclei.sample[row] else 32)


@pytest.mark.parametrize("radius", [1.0, 7.3, 25.0, 90.0])
def test_discs_by_hand(radius: float) -> None:
    nuclei = NucleiCentres.of_masks(masks_of())
    retained = torch.tensor([True, False, True, True])
    kept = kept_discs(nuclei, retained, torch.full((3,), radius), *SIZE)
    for b in range(3):
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                near = any(
                    (x + 0.5 - float(nuclei.xy[p, 0])) ** 2 + (y + 0.5 - float(nuclei.xy[p, 1])) ** 2 <= radius**2
                    for p in range(4)
                    if nuclei.sample[p] == b and retained[p]
                )
                own = bool(masks_of()[b, 0, y, x]) and bool(retained[int(nuclei.labels[b, y, x]) - 1])
                assert bool(kept[b, 0, y, x]) == (near or own)


def test_a_part_is_retained_and_at_least_one() -> None:
    masks = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    masks[0, 0, ::4, ::4] = True
    nuclei = NucleiCentres.of_masks(masks.expand(200, -1, -1, -1))
    seeds = torch.arange(200)
    share = retained_nuclei(nuclei, seeds, 0.3).double().mean()
    assert abs(float(share) - 0.3) < 0.02
    alone = retained_nuclei(nuclei, seeds, 0.0)
    assert torch.bincount(nuclei.sample[alone], minlength=200).eq(1).all()
    assert len(set(alone.view(200, 100).int().argmax(1).tolist())) > 60  # not always the same one
    assert retained_nuclei(nuclei, seeds, 1.0).all()


@pytest.mark.parametrize("block", [1, 2, 7, 16, 40])
def test_pixels_outside_change_places_and_nothing_else_does(block: int) -> None:
    tiles, kept = (
        unique_tiles(),
        kept_discs(NucleiCentres.of_masks(masks_of()), torch.ones(4) > 0, torch.ones(3) * 9, *SIZE),
    )
    out = exchange_outside(tiles, kept, torch.full((3,), float(block)), torch.ones(3), torch.arange(3))
    for b in range(3):
        inside = kept[b, 0]
        assert torch.equal(out[b, :, inside], tiles[b, :, inside])
        moved = out[b, :, ~inside]
        for channel in range(3):  # a permutation of what lies outside, the same one in each channel
            assert torch.equal(moved[channel].sort().values, tiles[b, channel, ~inside].sort().values)
        assert torch.equal(moved - moved[:1], tiles[b, :, ~inside] - tiles[b, :1, ~inside])
        assert (moved[0] != tiles[b, 0, ~inside]).double().mean() > 0.9
    if block == 7:  # whole blocks move as wholes: neighbours within one stay neighbours
        whole = out[1, 0, :56, :49].view(8, 7, 7, 7).permute(0, 2, 1, 3)
        assert (whole[..., 1:] - whole[..., :-1] == 1).double().mean() > 0.7


def test_single_pixels_go_anywhere() -> None:
    index = torch.arange(128 * 128.0).view(1, 1, 128, 128)
    out = exchange_outside(index, index < 0, torch.ones(1), torch.ones(1), torch.tensor([5])).flatten()
    correlation = torch.corrcoef(torch.stack([out, index.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.03
    assert float(((out[1:] - out[:-1]).abs() <= 2).double().mean()) < 1e-3  # neighbours do not stay together


@pytest.mark.parametrize(
    "ops", ["published", {"exchange": {"prob": 1.0, "strength": 0.5}, "noise": {"prob": 1.0, "strength": 0.5}}]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_retained_nuclei_leave_bit_identical(ops: object, dtype: torch.dtype) -> None:
    tiles = torch.randint(0, 256, (3, 3, *SIZE), dtype=torch.uint8)
    tiles = tiles if dtype == torch.uint8 else (tiles / 255).to(dtype)
    masks, seeds = masks_of(), torch.arange(3)
    nuclei = NucleiCentres.of_masks(masks)
    ncp = BatchedNCP(ops, keep_radius_um=3.0, retain_prob=0.5, block_um=0.5)
    out = ncp(tiles, masks, 0.5, seeds=seeds)
    retained = retained_nuclei(nuclei, seeds, 0.5)
    kept = kept_discs(nuclei, retained, torch.full((3,), 6.0), *SIZE).expand_as(tiles)
    assert out.dtype == dtype
    assert torch.equal(out[kept], tiles[kept])
    assert torch.equal(out[1], tiles[1])  # no nuclei: as it came
    changed = (out != tiles)[0][~kept[0]].double().mean()
    assert changed > (0.9 if ops == "published" else 0.5)
    by_points = ncp(
        tiles, None, 0.5, seeds=seeds, nuclei=NucleiCentres.of_points([nuclei.xy[:3], nuclei.xy[:0], nuclei.xy[3:]])
    )
    assert torch.equal(by_points[0, :, 28:38, 18:29], out[0, :, 28:38, 18:29])
    alone = ncp(tiles[2:], masks[2:], 0.5, seeds=seeds[2:])
    assert torch.equal(alone[0], out[2])


def test_not_retained_nuclei_are_perturbed_too() -> None:
    tiles, masks = torch.full((1, 3, *SIZE), 230, dtype=torch.uint8), masks_of()[:1]
    tiles[masks.expand_as(tiles)] = 20
    out = BatchedNCP("published", keep_radius_um=4.0, retain_prob=0.0)(tiles, masks, 1.0)
    per_nucleus = [(out[0, 0][masks[0, 0]] == 20).sum()]
    dark = (out[0, 0] == 20) & masks[0, 0]
    labels = NucleiCentres.of_masks(masks).labels[0]
    whole = [bool(dark[labels == n].all()) for n in (1, 2, 3)]
    assert sum(whole) == 1
    assert int((out == 20).sum()) == int((tiles == 20).sum())  # strewn, not lost
    assert int(per_nucleus[0]) < int(masks.sum())


def test_margin_goes_with_retaining_a_part() -> None:
    tiles, masks = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8), masks_of()[:1]
    noise = {"noise": {"prob": 1.0, "strength": 1.0}}
    seeds = torch.tensor([3])
    out = BatchedNCP(noise, margin_um=0.0, feather_um=0.0, retain_prob=0.0)(tiles, masks, 0.5, seeds=seeds)
    nuclei = NucleiCentres.of_masks(masks)
    kept = retained_nuclei(nuclei, seeds, 0.0)
    for n in range(3):
        own = (nuclei.labels[0] == n + 1).expand(3, -1, -1)
        assert torch.equal(out[0][own], tiles[0][own]) == bool(kept[n])


def test_bad_input_is_told() -> None:
    tiles, masks = torch.zeros(3, 3, *SIZE, dtype=torch.uint8), masks_of()
    with pytest.raises(ValueError, match=r"keep_radius_um 0.1 is 0.2 pixels"):
        BatchedNCP("published", keep_radius_um=0.1)(tiles, masks, 0.5)
    with pytest.raises(ValueError, match=r"retain_prob is 1.5"):
        BatchedNCP("published", retain_prob=1.5)
    with pytest.raises(ValueError, match="block_um is -1"):
        BatchedNCP("published", block_um=-1)
    with pytest.raises(ValueError, match="masks is missing"):
        BatchedNCP("default")(tiles, None, 0.5, nuclei=NucleiCentres.of_masks(masks))
    with pytest.raises(ValueError, match="nuclei are those of 3 tiles"):
        BatchedNCP()(tiles[:2], masks[:2], 0.5, nuclei=NucleiCentres.of_masks(masks))
    with pytest.raises(ValueError, match="points of tile 1"):
        NucleiCentres.of_points([torch.zeros(2, 2), torch.zeros(3)])


def whole_tile_views(**kwargs: object) -> ViewGenerator:
    """Views that show the whole tile, each pixel once: what they show is the tile that they were cut from."""
    settings = {
        "global_size": 64, "local_size": 64, "n_local": 2, "global_scale": (1.0, 1.0), "local_scale": (1.0, 1.0),
        "ratio": (1.0, 1.0), "flip": False, "turn": False, "stain_prob": 0.0, "blur_prob": 0.0,
    }  # fmt: skip
    return ViewGenerator(**{**settings, **kwargs})


def test_the_tile_is_perturbed_once_for_all_views() -> None:
    tiles = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    masks = torch.zeros(4, 1, 64, 64, dtype=torch.bool)
    masks[:, :, 20:30, 12:22] = masks[:, :, 40:44, 50:54] = True
    ncp = BatchedNCP("published", keep_radius_um=4.0)
    out = whole_tile_views(ncp=ncp)(tiles, 0.5, masks)
    views = [(view * 255).round().to(torch.uint8) for view in out["global"] + out["local"]]
    assert all(torch.equal(view, views[0]) for view in views)
    assert not torch.equal(views[0], tiles)
    assert torch.equal(views[0].flatten(2).sort().values, tiles.flatten(2).sort().values)
    apart = whole_tile_views(ncp=ncp, ncp_views="all")(tiles, 0.5, masks)
    assert not torch.equal(apart["global"][0], apart["global"][1])


def test_every_view_draws_a_nucleus_of_its_own_each_alike() -> None:
    # A large nucleus and eight small ones, each of its own colour: the colour at a view's middle tells which was drawn.
    tile, mask = torch.full((3, 192, 192), 250, dtype=torch.uint8), torch.zeros(1, 192, 192, dtype=torch.bool)
    for number in range(9):
        y, x, side = 40 + 52 * (number // 3), 40 + 52 * (number % 3), 30 if number == 4 else 8
        at = slice(y - side // 2, y + side // 2), slice(x - side // 2, x + side // 2)
        tile[:, at[0], at[1]], mask[:, at[0], at[1]] = 20 * number, True
    views = ViewGenerator(32, 32, 2, 2, (0.02, 0.04), (0.02, 0.04), stain_prob=0.0, blur_prob=0.0, find_nuclei=False)(
        tile.expand(300, -1, -1, -1), 0.5, mask.expand(300, -1, -1, -1)
    )
    drawn = torch.stack(
        [(view[:, 0, 15:17, 15:17].amin((1, 2)) * 255 / 20).round() for view in views["global"] + views["local"]]
    )
    counts = torch.bincount(drawn.flatten().long(), minlength=9)
    assert len(counts) == 9
    assert 80 < int(counts.min()) <= int(counts.max()) < 190  # 133 expected, deviation 11
    for one in range(4):
        for other in range(one):  # independent of one another: the same in one of nine
            assert float((drawn[one] == drawn[other]).double().mean()) < 0.2


def test_views_may_be_centred_on_retained_nuclei_alone() -> None:
    tiles = torch.full((64, 3, 96, 96), 240, dtype=torch.uint8)
    masks = torch.zeros(64, 1, 96, 96, dtype=torch.bool)
    for y, x in ((20, 20), (20, 76), (76, 20), (76, 76)):
        masks[:, :, y - 4 : y + 4, x - 4 : x + 4] = True
    tiles[masks.expand_as(tiles)] = 20
    ncp = BatchedNCP("published", keep_radius_um=4.0, retain_prob=0.0)
    settings = {"n_global": 4, "n_local": 0, "global_size": 32, "global_scale": (0.04, 0.06)}
    settings |= {"ncp": ncp, "stain_prob": 0.0, "blur_prob": 0.0}
    for centre_on, share in (("retained", 1.0), ("nuclei", 0.25)):
        views = ViewGenerator(**settings, centre_on=centre_on)(tiles, 0.5, masks)["global"]
        whole = (
            torch.stack([(view[:, 0, 13:19, 13:19] < 0.2).float().mean((1, 2)) > 0.9 for view in views]).double().mean()
        )
        assert abs(float(whole) - share) < 0.12


def test_points_of_a_detector_need_no_masks() -> None:
    tiles = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    nuclei = NucleiCentres.of_points([torch.tensor([[20.0, 30.0]]), torch.tensor([[40.0, 10.0], [5.0, 60.0]])])
    make = whole_tile_views(ncp=BatchedNCP("published", keep_radius_um=2.0))
    out = make(tiles, 0.5, nuclei=nuclei)
    view = (out["global"][0] * 255).round().to(torch.uint8)
    assert torch.equal(view[0, :, 28:32, 18:22], tiles[0, :, 28:32, 18:22])
    assert not torch.equal(view[0], tiles[0])
    assert out["nuclei"] == []
