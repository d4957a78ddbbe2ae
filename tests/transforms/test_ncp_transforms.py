"""Properties of the perturbation on random tiles: per sample, in a batch, and inside MONAI's machinery."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import CastToTyped, Compose, Flipd, Identityd, OneOf, SpatialPadd

from cytossl_monai.transforms.ncp.array import NucleiCenteredPerturb, RandNucleiCenteredPerturb
from cytossl_monai.transforms.ncp.batched import BatchedNCP
from cytossl_monai.transforms.ncp.dictionary import NucleiCenteredPerturbd, RandNucleiCenteredPerturbd
from cytossl_monai.transforms.ncp.settings import OP_NAMES

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
OFTEN = {name: {"prob": 0.7, "strength": 1.0} for name in OP_NAMES}


@st.composite
def tiles(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """A tile of any size and dtype, a mask of any fill (empty and full too), a scale and a seed."""
    height, width = draw(st.integers(1, 45)), draw(st.integers(1, 45))
    channels = draw(st.sampled_from([1, 3]))
    seed = draw(st.integers(0, 2**62 - 1))
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (channels, height, width), dtype=np.uint8)
    dtype = draw(st.sampled_from(DTYPES))
    image = torch.from_numpy(raw)
    image = image if dtype == torch.uint8 else (image.double() / 255).to(dtype)
    fill = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    mask = torch.from_numpy(rng.random((1, height, width)) < fill)
    if draw(st.booleans()):  # non-contiguous
        image, mask = image.transpose(1, 2), mask.transpose(1, 2)
    return image, mask, draw(st.sampled_from([0.1, 0.25, 0.5, 2.0])), seed


@settings(max_examples=120, deadline=None)
@given(tiles(), st.sampled_from(["keep", "perturb"]))
def test_what_always_holds(case: tuple[torch.Tensor, torch.Tensor, float, int], empty: str) -> None:
    image, mask, mpp, seed = case
    before = image.clone()
    rand = RandNucleiCenteredPerturb(OFTEN, empty=empty).set_random_state(seed % 2**31)
    donor = image.flip(1)
    out = rand(image, mask, mpp, donor=donor)
    assert torch.equal(image, before)
    assert out.dtype == image.dtype
    assert out.shape == image.shape
    inside = mask.expand_as(image)
    assert torch.equal(out.as_tensor()[inside], image[inside])
    limit = 255 if image.dtype == torch.uint8 else 1
    assert bool(((out >= 0) & (out <= limit)).all())
    again = RandNucleiCenteredPerturb(OFTEN, empty=empty).set_random_state(seed % 2**31)(image, mask, mpp, donor=donor)
    assert torch.equal(out, again)
    if empty == "keep" and not mask.any():
        assert torch.equal(out.as_tensor(), image)


@settings(max_examples=60, deadline=None)
@given(tiles(), st.integers(2, 5))
def test_per_sample_and_batched_agree(case: tuple[torch.Tensor, torch.Tensor, float, int], batch: int) -> None:
    image, mask, mpp, seed = case
    ops = {name: setting for name, setting in OFTEN.items() if name != "swap"}
    rand = RandNucleiCenteredPerturb(ops, prob=0.8).set_random_state(seed % 2**31)
    alone, seeds = [], []
    images = [torch.roll(image, k, dims=2) for k in range(batch)]
    masks = [torch.roll(mask, k, dims=2) for k in range(batch)]
    for one, nuclei in zip(images, masks):
        alone.append(rand(one, nuclei, mpp).as_tensor())
        seeds.append(rand.seed)
    whole = BatchedNCP(ops, prob=0.8)(torch.stack(images), torch.stack(masks), mpp, seeds=torch.tensor(seeds))
    assert torch.equal(whole, torch.stack(alone))


def example(size: int = 40) -> dict[str, Any]:
    image = MetaTensor(torch.randint(0, 256, (3, size, size), dtype=torch.uint8))
    image.affine[0, 3] = 7.0
    nuclei = torch.zeros(1, size, size, dtype=torch.uint8)
    nuclei[:, 8:16, 10:22] = 1
    return {"image": image, "nuclei": nuclei, "mpp": 0.5}


def test_swap_with_the_same_donor_agrees_with_the_batch() -> None:
    one, two = example(), example()
    ops = {"swap": {"prob": 1.0, "strength": 1.0}, "stain": {"prob": 1.0, "strength": 1.0}}
    images = torch.stack([one["image"].as_tensor(), two["image"].as_tensor()])
    masks = torch.stack([one["nuclei"], two["nuclei"]])
    whole = BatchedNCP(ops)(images, masks, 0.5, seeds=torch.tensor([11, 12]))
    rand = RandNucleiCenteredPerturb(ops)
    rand.seed = 11
    alone = rand(images[0], masks[0], 0.5, donor=images[1], donor_mask=masks[1], randomize=False)
    assert torch.equal(alone.as_tensor(), whole[0])


def test_deterministic_transform_uses_its_whole_strength() -> None:
    sample = example()
    fade = NucleiCenteredPerturb({"fade": 1.0}, mpp=0.5, margin_um=0.0, feather_um=0.0)
    out = fade(sample["image"], sample["nuclei"])
    outside = ~sample["nuclei"].bool()[0]
    assert bool((out.as_tensor()[:, outside].float().std(1) == 0).all())  # nothing but the colour of glass
    assert torch.equal(out, fade(sample["image"], sample["nuclei"]))


def test_dictionary_twins_do_what_the_array_ones_do() -> None:
    sample = example()
    array = RandNucleiCenteredPerturb("strong").set_random_state(5)
    twin = RandNucleiCenteredPerturbd(["image"], "strong").set_random_state(5)
    assert torch.equal(twin(sample)["image"], array(sample["image"], sample["nuclei"], 0.5))
    ops = {"blur": 0.7, "noise": 0.4}
    fixed, fixed_twin = NucleiCenteredPerturb(ops, seed=3), NucleiCenteredPerturbd("image", ops, seed=3)
    assert torch.equal(fixed_twin(sample)["image"], fixed(sample["image"], sample["nuclei"], 0.5))


def test_numpy_in_and_metadata_kept() -> None:
    sample = example()
    sample["image"] = Flipd("image", 1)({"image": sample["image"]})["image"]
    out = RandNucleiCenteredPerturbd("image", "strong")(sample)["image"]
    assert isinstance(out, MetaTensor)
    assert torch.equal(out.affine, sample["image"].affine)
    assert [op["class"] for op in out.applied_operations] == ["Flip"]
    array = sample["image"].numpy()
    before = array.copy()
    assert RandNucleiCenteredPerturb("strong")(array, sample["nuclei"].numpy(), 0.5).dtype == torch.uint8
    np.testing.assert_array_equal(array, before)


def test_mpp_comes_from_call_then_transform_then_metadata() -> None:
    sample = example()
    blur = {"blur": 1.0}
    explicit = NucleiCenteredPerturb(blur)(sample["image"], sample["nuclei"], 0.25)
    sample["image"].meta["mpp"] = 0.25
    assert torch.equal(NucleiCenteredPerturb(blur)(sample["image"], sample["nuclei"]), explicit)
    assert not torch.equal(NucleiCenteredPerturb(blur, mpp=0.5)(sample["image"], sample["nuclei"]), explicit)
    assert torch.equal(NucleiCenteredPerturb(blur, mpp=0.5)(sample["image"], sample["nuclei"], 0.25), explicit)


def test_without_micrometres_no_mpp_is_needed() -> None:
    sample = example()
    plain = NucleiCenteredPerturb({"noise": 1.0}, margin_um=0.0, feather_um=0.0)
    assert not torch.equal(plain(sample["image"], sample["nuclei"]), sample["image"])


def test_compose_and_one_of() -> None:
    sample = example()

    def make() -> Compose:
        choice = OneOf([RandNucleiCenteredPerturbd("image", "strong"), RandNucleiCenteredPerturbd("image", "light")])
        return Compose([choice]).set_random_state(9)

    first, again = make()(sample)["image"], make()(sample)["image"]
    assert torch.equal(first, again)
    assert not torch.equal(first, sample["image"])


def test_pickled_transform_goes_on_alike() -> None:
    sample = example()
    one = RandNucleiCenteredPerturbd("image", "strong").set_random_state(2)
    one(sample)
    other = pickle.loads(pickle.dumps(one))
    assert torch.equal(one(sample)["image"], other(sample)["image"])
    batched = pickle.loads(pickle.dumps(BatchedNCP("strong")))
    assert repr(batched) == repr(BatchedNCP("strong"))


@pytest.mark.parametrize("cast", [False, True])
def test_lazy_pipeline_equals_the_eager_one(cast: bool) -> None:
    sample = example()
    if not cast:
        sample["image"] = sample["image"] / 255.0

    def steps() -> list[Any]:
        return [
            SpatialPadd(["image", "nuclei"], (48, 48), mode="constant"),
            Flipd(["image", "nuclei"], 0),
            # MONAI's lazy resampling gives float32 in [0, 255] for uint8; a cast brings the dtype back.
            CastToTyped("image", torch.uint8) if cast else Identityd("image"),
            RandNucleiCenteredPerturbd("image", "strong"),
        ]

    sample["nuclei"] = MetaTensor(sample["nuclei"])
    eager = Compose(steps()).set_random_state(4)(sample)
    lazy = Compose(steps(), lazy=True).set_random_state(4)(sample)
    assert torch.equal(lazy["nuclei"] > 0.5, eager["nuclei"] > 0.5)
    assert torch.equal(lazy["image"], eager["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_differ_and_repeat(workers: int) -> None:
    data = [example()] * 4

    def run() -> torch.Tensor:
        dataset = Dataset(data, Compose([RandNucleiCenteredPerturbd("image", "strong")]).set_random_state(1))
        torch.manual_seed(3)
        loader = DataLoader(dataset, batch_size=1, num_workers=workers)
        return torch.cat([batch["image"].as_tensor() for batch in loader])

    first = run()
    assert len({sample.numpy().tobytes() for sample in first}) == 4  # the same tile, four perturbations
    assert torch.equal(first, run())


@pytest.mark.realdata
def test_real_fields(data_root: Any) -> None:
    from skimage.io import imread

    names = sorted((data_root / "nuclei_lbc" / "images").iterdir())[:3]
    images = torch.stack([torch.from_numpy(imread(n)[..., :3].copy()).permute(2, 0, 1) for n in names])
    by_stem = {p.stem: p for p in (data_root / "nuclei_lbc" / "masks").iterdir()}
    masks = [torch.from_numpy(np.asarray(imread(by_stem[n.stem]))) for n in names]
    mask = torch.stack([(m if m.ndim == 2 else m[..., 0]) > 127 for m in masks]).unsqueeze(1)
    out = BatchedNCP("strong")(images, mask, 0.9, torch.Generator().manual_seed(0))
    inside = mask.expand_as(images)
    assert torch.equal(out[inside], images[inside])
    assert (out != images)[~inside].float().mean() > 0.3
