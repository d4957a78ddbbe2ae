"""BatchedNCP: nuclei stay, seeds decide, samples do not see each other."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from cytossl_monai.transforms.kernels.chunks import chunks
from cytossl_monai.transforms.ncp import perturb
from cytossl_monai.transforms.ncp.batched import BatchedNCP
from cytossl_monai.transforms.ncp.settings import OP_NAMES, PRESETS


def tiles_and_masks(batch: int = 5, size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    tiles = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    masks = torch.zeros(batch, 1, size, size, dtype=torch.bool)
    masks[:, :, 10:20, 12:25] = True
    return tiles, masks


ALONE = {name: {"prob": 0.8, "strength": 1.0} for name in OP_NAMES if name != "swap"}


@pytest.mark.parametrize("name", OP_NAMES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_each_op_changes_the_background_and_no_nucleus(name: str, dtype: torch.dtype) -> None:
    tiles, masks = tiles_and_masks()
    images = tiles if dtype == torch.uint8 else (tiles.float() / 255).to(dtype)
    before = images.clone()
    out = BatchedNCP({name: {"prob": 1.0, "strength": 1.0}})(images, masks, 0.5)
    inside = masks.expand_as(out)
    assert out.dtype == dtype
    assert torch.equal(images, before)
    assert torch.equal(out[inside], images[inside])
    assert all((out[i] != images[i]).any() for i in range(len(out)))
    assert out.float().min() >= 0
    assert out.float().max() <= (255 if dtype == torch.uint8 else 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_same_generator_same_pixels(preset: str) -> None:
    tiles, masks = tiles_and_masks()
    ncp = BatchedNCP(preset)
    first, again, other = (ncp(tiles, masks, 0.5, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_sample_is_perturbed_alone_as_in_a_batch() -> None:
    tiles, masks = tiles_and_masks(7, 50)
    mpp = torch.linspace(0.2, 1.0, 7)
    seeds = torch.arange(7) * 977 + 5
    ncp = BatchedNCP(ALONE)
    whole = ncp(tiles, masks, mpp, seeds=seeds)
    for i in range(7):
        one = slice(i, i + 1)
        assert torch.equal(ncp(tiles[one], masks[one], mpp[one], seeds=seeds[one]), whole[one])


def test_no_swap_in_a_batch_of_one() -> None:
    tiles, masks = tiles_and_masks(1)
    out = BatchedNCP({"swap": {"prob": 1.0, "strength": 1.0}})(tiles, masks, 0.5)
    assert torch.equal(out, tiles)


def test_swap_brings_no_nuclei_of_the_donor() -> None:
    tiles = torch.full((2, 3, 64, 64), 230, dtype=torch.uint8)
    masks = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    for row, place in enumerate((slice(8, 20), slice(40, 52))):
        tiles[row, :, place, place] = 40
        masks[row, :, place, place] = True
    out = BatchedNCP({"swap": {"prob": 1.0, "strength": 1.0}}, margin_um=1.0)(tiles, masks, 0.5)
    assert ((out < 100) == masks.expand_as(out)).all()


def test_empty_tiles_are_kept_perturbed_or_dropped() -> None:
    tiles, masks = tiles_and_masks(4)
    masks[2] = False
    noise = {"noise": {"prob": 1.0, "strength": 1.0}}
    kept = BatchedNCP(noise, empty="keep")(tiles, masks, 0.5)
    assert torch.equal(kept[2], tiles[2])
    assert not torch.equal(kept[1], tiles[1])
    assert not torch.equal(BatchedNCP(noise, empty="perturb")(tiles, masks, 0.5)[2], tiles[2])
    assert BatchedNCP(noise, empty="drop")(tiles, masks, 0.5).shape[0] == 3
    assert BatchedNCP.kept(masks).tolist() == [0, 1, 3]


@pytest.mark.parametrize("at_a_time", [20, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_writing_over_the_input_gives_the_same(
    dtype: torch.dtype, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perturb, "chunks", lambda images: chunks(images, at_a_time * 33 * 40))
    images = torch.rand(20, 3, 33, 40)
    images = images.mul(255).to(dtype) if dtype == torch.uint8 else images.to(dtype)
    masks = torch.rand(20, 1, 33, 40) < 0.05
    masks[3] = False
    # Every other sample's background is taken by some: none may be read after it was written to.
    ncp = BatchedNCP({"swap": {"prob": 0.7, "strength": 1.0}, "fade": {"prob": 0.5, "strength": 1.0}})
    seeds = torch.arange(20)
    expected = ncp(images, masks, 0.5, seeds=seeds)
    copy = images.clone()
    assert ncp(copy, masks, 0.5, seeds=seeds, out=copy) is copy
    assert torch.equal(copy, expected)
    assert not torch.equal(copy, images)
    beside = images.clone()  # other names of the same memory
    assert torch.equal(ncp(beside, masks, 0.5, seeds=seeds, out=beside[:]), expected)
    beside = images.clone()
    drawn, mpp = ncp.settings.draw(seeds), torch.full((20,), 0.5)
    perturb.perturb(beside, masks, mpp, drawn, ncp.settings, donors=beside, donor_masks=masks, out=beside)
    assert torch.equal(beside, expected)


def test_an_unfit_place_to_write_to_is_refused() -> None:
    images, masks = torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    for out in (torch.empty(2, 3, 8, 9), torch.empty(2, 3, 8, 8, dtype=torch.float64), images.transpose(2, 3)):
        with pytest.raises(ValueError, match="out is"):
            BatchedNCP()(images, masks, 0.5, out=out)


@pytest.mark.parametrize("op", OP_NAMES)
def test_metatensors_are_taken_and_given_back(op: str) -> None:
    images, masks = tiles_and_masks()
    ncp = BatchedNCP({op: {"prob": 1.0, "strength": 1.0}})
    seeds = torch.arange(len(images))
    expected = ncp(images, masks, 0.5, seeds=seeds)
    for source in (images, images.float() / 255):
        with_meta = MetaTensor(source, affine=torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0])), meta={"slide_id": "a"})
        out = ncp(with_meta, MetaTensor(masks), 0.5, seeds=seeds)
        assert isinstance(out, MetaTensor)
        assert torch.equal(out.affine, with_meta.affine)
        assert out.meta["slide_id"] == "a"
        plain = ncp(source, masks, 0.5, seeds=seeds)
        assert torch.equal(out.as_tensor(), plain)
    assert not torch.equal(expected, images)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (torch.zeros(2, 1, 8, 9), r"masks has the shape .*\(2, 1, 8, 8\)"),
        (torch.zeros(3, 1, 8, 8), "masks has the shape"),
        (None, "masks is a NoneType"),
    ],
)
def test_shapes_are_looked_at_without_check_too(masks: torch.Tensor, words: str) -> None:
    ncp = BatchedNCP("default", prob=1.0)
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=words):
        ncp(images, masks, 0.5, check=False)
    with pytest.raises(ValueError, match="dtype torch"):
        ncp(images.long(), torch.zeros(2, 1, 8, 8), 0.5, check=False)
    mask = torch.rand(2, 1, 8, 8) < 0.3
    seeds = torch.arange(2)
    bools = ncp(images, mask, 0.5, seeds=seeds)
    assert torch.equal(ncp(images, mask.to(torch.uint8), 0.5, seeds=seeds, check=False), bools)
