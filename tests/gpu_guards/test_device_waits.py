"""What a CPU forgives and a GPU does not: waits for the device in the middle of a step, unusual layouts of memory.

The step and the views run on a pretended device here (`pretend_device`): what they compute is what the CPU computes,
and tables name each place at which the host may wait for the device, how often, and what for.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import pytest
import torch
from pretend_device import DEVICE, DeviceGenerator, OnDevice, PretendDevice, move
from small_steps import ALLOWED, METHODS, method_of, take_step, tiles, views_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cytossl_monai.data.tiles.loader import tile_loader
from cytossl_monai.engines import build_optimizer
from cytossl_monai.methods import SSLMethod
from cytossl_monai.transforms import BatchedNCP, ViewGenerator, nuclei_mask

DRAWN_ON_HOST = ("block_masks", "kept_patches")
SHARED = {
    "transforms/nuclei/labels.py:_label_by_runs: nonzero": 3,  # runs of pixels: of levels, of regions, of nuclei
    "transforms/nuclei/labels.py:_first_connected: value read": 3,  # whether all runs that touch are linked
    "transforms/nuclei/labels.py:_label_by_runs: value read": 3,  # and how many components they make
    "transforms/nuclei/labels.py:label_levels: nonzero": 1,  # rows that are not empty
    "transforms/nuclei/labels.py:label_levels: value read": 1,  # and how many they are
    "transforms/nuclei/labels.py:label_levels: copy to the host": 1,  # regions of each level
    "transforms/nuclei/batch.py:pick_regions: nonzero": 3,  # pixels above the lowest level, of rims, and below those
    "transforms/kernels/stained.py:stained_regions: nonzero": 1,  # pixels of the regions
    "transforms/kernels/stained.py:_grouped_mean: nonzero": 2,  # of their cores, and of what is around them
    "transforms/nuclei/centres.py:_of_labels: nonzero": 1,  # nuclear pixels
    "transforms/nuclei/centres.py:_of_labels: copy to the host": 1,  # centres: views are cut around them
    "transforms/ncp/perturb.py:perturb: copy to the host": 1,  # which tiles have nuclei at all
}
WAITS_OF_VIEWS: dict[str, dict[str, int]] = {
    "published": {
        **SHARED,
        "transforms/ncp/exchange.py:_sources: boolean index": 1,  # pixels that change places
    },
    "default": {**SHARED, "transforms/ncp/plate.py:of: nonzero": 1},  # nuclear pixels of tiles and of donors
}
"""What the host waits for while it makes the views of a batch, however large it is and however many views are cut."""


def losses_of(method: SSLMethod, views: dict[str, list[Tensor]], counter: PretendDevice | None = None) -> list[float]:
    """Three steps; counted is the last, for some things are made once, at the first."""
    optimizer, losses = build_optimizer(method, "adamw", lr=1e-3), []
    for _ in range(3):
        if counter is not None:
            counter.waits.clear()
            counter.copies.clear()
        losses.append(take_step(method, views, optimizer))
    return [float(loss.inner) if isinstance(loss, OnDevice) else float(loss) for loss in losses]


class Autocast(contextlib.nullcontext):  # type: ignore[type-arg]
    """In the place of ``torch.autocast``, which does not know the pretended device: remembers for which it is meant."""

    devices: ClassVar[list[str]] = []

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
        super().__init__()
        self.devices.append(device_type)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_stays_on_the_device_and_does_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses as on the CPU; no operation mixes both, which fails; autocast is the device's."""
    views = views_of(name)
    expected = losses_of(method_of(name), views)
    method = move(method_of(name))
    views = {key: [OnDevice(view) for view in value] for key, value in views.items()}
    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(Autocast, "devices", [])
    with PretendDevice() as counter:
        losses = losses_of(method, views, counter)
    assert losses == pytest.approx(expected, rel=1e-6)  # sums of other addresses may be rounded otherwise
    assert dict(counter.waits) == ALLOWED.get(name, {})
    assert set(Autocast.devices) == {DEVICE.type}
    # A recorded CUDA graph (mode: reduce-overhead) repeats no copy from the host: masks alone are drawn there.
    assert set(counter.copies) <= {f"methods/parts/masking.py:{draw}: copy to the device" for draw in DRAWN_ON_HOST}


@pytest.mark.parametrize("name", METHODS)
def test_channels_last_and_strided_views_give_the_same_loss(name: str) -> None:
    views = views_of(name)
    expected = method_of(name)(views)["loss"]
    wide = {key: [torch.stack([v, -v], dim=-1)[..., 0] for v in value] for key, value in views.items()}
    last = {key: [v.contiguous(memory_format=torch.channels_last) for v in value] for key, value in views.items()}
    assert not any(v.is_contiguous() for v in wide["global"])
    for other in (wide, last):
        torch.testing.assert_close(method_of(name)(other)["loss"], expected, rtol=1e-4, atol=1e-5)


def test_kernels_take_any_layout_of_memory() -> None:
    images, mpp = tiles(), torch.full((4,), 0.5)
    seeds = torch.arange(4)
    mask, ncp = nuclei_mask(images, mpp), BatchedNCP("default")
    assert mask.any()
    expected = ncp(images, mask, mpp, seeds=seeds)
    views = ViewGenerator(32, 16, n_local=1, ncp=ncp)
    drawn = views(images, mpp, generator=torch.Generator().manual_seed(3))
    wide = torch.stack([images, images], dim=-1)[..., 0]
    last = images.contiguous(memory_format=torch.channels_last)
    assert not wide.is_contiguous()
    for other in (wide, last):
        assert torch.equal(nuclei_mask(other, mpp), mask)
        assert torch.equal(ncp(other, mask.expand_as(mask), mpp, seeds=seeds), expected)
        again = views(other, mpp, generator=torch.Generator().manual_seed(3))
        assert all(torch.equal(a, b) for key in ("global", "local") for a, b in zip(drawn[key], again[key]))


def views_on_device(
    ncp: str, batch: int, n_local: int, generator: torch.Generator
) -> tuple[dict[str, Any], dict[str, Any], PretendDevice]:
    """Views by the CPU, the same by the pretended device, and what was counted there."""
    images, mpp = tiles().repeat(batch // 4, 1, 1, 1), torch.full((batch,), 0.5)
    views = ViewGenerator(32, 16, n_local=n_local, ncp=BatchedNCP(ncp))
    here = views(images, mpp, generator=torch.Generator().manual_seed(0))
    with PretendDevice() as counter:
        there = views(OnDevice(images), mpp, generator=generator.manual_seed(0))
    return here, there, counter


@pytest.mark.parametrize("ncp", WAITS_OF_VIEWS)
def test_views_of_a_device_are_the_cpus_and_each_wait_is_named(ncp: str) -> None:
    few = views_on_device(ncp, 4, 1, torch.Generator())[2]
    here, there, many = views_on_device(ncp, 16, 4, torch.Generator())
    for key in ("global", "local", "nuclei"):
        assert all(torch.equal(a, b.inner) for a, b in zip(here[key], there[key], strict=True))
    allowed = WAITS_OF_VIEWS[ncp]
    for counter in (few, many):
        assert not counter.waits.keys() - allowed.keys()
        assert all(count <= allowed[wait] for wait, count in counter.waits.items()), dict(counter.waits)
    assert set(many.copies) == {"transforms/kernels/device.py:to_device: copy to the device"}


def test_a_device_cuts_around_the_same_of_many_nuclei() -> None:
    images, mpp = tiles().repeat(4, 1, 1, 1), torch.full((16,), 0.5)
    scattered = torch.rand(16, 1, 64, 64, generator=torch.Generator().manual_seed(1)) < 0.01
    masks = torch.nn.functional.max_pool2d(scattered.float(), 3, stride=1, padding=1) > 0
    images = torch.where(masks, 90, images).to(torch.uint8)
    views = ViewGenerator(32, 16, n_local=4, ncp=BatchedNCP("published"), centre_on="retained")
    here = views(images, mpp, masks, torch.Generator().manual_seed(0))
    with PretendDevice():
        there = views(OnDevice(images), mpp, OnDevice(masks), torch.Generator().manual_seed(0))
    for key in ("global", "local", "nuclei"):
        assert all(torch.equal(a, b.inner) for a, b in zip(here[key], there[key], strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"ops": {"swap": {"prob": 1, "strength": 1}, "stain": {"prob": 1, "strength": 1}}},  # of all tiles at once
        {"ops": "strong", "margin_um": 9.0, "feather_um": 14.0},  # further than one look at shifted copies reaches
        {"ops": "strong", "keep_radius_um": 6.0, "retain_prob": 0.5},
        {"ops": {"exchange": {"prob": 1, "strength": 0.6}}, "block_um": 4.0, "random_amount": True},
        {
            "ops": {"exchange": {"prob": 0.7, "strength": 1}, "noise": {"prob": 0.5, "strength": 1}},
            "keep_radius_um": 6.0,
        },
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_ncp_of_a_device_is_the_cpus(settings: dict[str, Any], dtype: torch.dtype) -> None:
    images = tiles().repeat(3, 1, 1, 1)
    masks = nuclei_mask(images, 0.5)
    masks[1] = False
    images = images - torch.randint(0, 40, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images if dtype == torch.uint8 else (images / 255).to(dtype)
    mpp, seeds, ncp = torch.tensor([0.5, 0.25, 0.4]).repeat(4), torch.arange(12), BatchedNCP(**settings)
    here = ncp(images, masks, mpp, seeds=seeds)
    with PretendDevice():
        there = ncp(OnDevice(images), OnDevice(masks), mpp, seeds=seeds)
        over = OnDevice(images.clone())
        assert ncp(over, OnDevice(masks), mpp, seeds=seeds, out=over) is over
    assert not torch.equal(here, images)
    assert torch.equal(here, there.inner)
    assert torch.equal(here, over.inner)


def test_numbers_of_a_generator_on_the_device_come_in_one_copy() -> None:
    here, there, counter = views_on_device("published", 4, 2, DeviceGenerator())
    assert all(torch.equal(a, b.inner) for a, b in zip(here["global"], there["global"], strict=True))
    assert counter.waits["transforms/views/draws.py:draw_views: copy to the host"] == 1
    assert not any("draws.py" in wait and "host" not in wait for wait in counter.waits)


def test_the_pretended_device_counts_what_waits_and_refuses_a_mixture() -> None:
    with PretendDevice() as counter:
        x = torch.arange(6.0).to(DEVICE)  # waits: not said to be non_blocking
        assert torch.arange(3).to(DEVICE, non_blocking=True).device == DEVICE
        assert float(x.sum()) == 15.0
        assert len(x[x > 2]) == 3
        assert x.nonzero().tolist() == [[1], [2], [3], [4], [5]]
        assert torch.equal(x[torch.tensor([1, 2])], x[1:3])
        assert x.cpu().sum() == 15.0
        x[0] = 0.0
        with pytest.raises(RuntimeError, match="mixes tensors of the device and of the host"):
            x + torch.ones(6)
    counted = {wait.split(": ")[1]: count for wait, count in counter.waits.items()}
    assert counted == {
        "copy to the device": 1,
        "value read": 2,
        "boolean index": 1,
        "nonzero": 1,
        "index on the host": 1,
        "copy to the host": 2,
        "number set": 1,
    }
    assert sum(counter.copies.values()) == 1


class WideIndices(TorchDispatchMode):
    """Fails where an index has fewer than 64 bits: beyond 2**31 pixels a batch on a large GPU would wrap around."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).rsplit(".", 1)[0].removeprefix("aten.").strip("_")
        at: list[Any] = []
        if name.startswith(("index_select", "index_add", "index_copy", "index_fill", "gather", "scatter")):
            at = [args[2]]
        elif name in ("index", "index_put", "unsafe_index", "index_put_impl"):
            at = [value for value in args[1] if value is not None]
        assert all(value.dtype in (torch.int64, torch.bool) for value in at), f"{name} by {[v.dtype for v in at]}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ncp", WAITS_OF_VIEWS)
def test_indices_of_views_have_64_bits(ncp: str) -> None:
    views = ViewGenerator(32, 16, n_local=1, ncp=BatchedNCP(ncp))
    with WideIndices():
        views(tiles(), torch.full((4,), 0.5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", METHODS)
def test_indices_of_steps_have_64_bits(name: str) -> None:
    method, views = method_of(name), views_of(name)
    with WideIndices():
        method(views)["loss"].backward()


def test_batches_are_pinned_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sampler: Any = [[(0, 0), (1, 1)]]
    assert tile_loader(range(8), sampler, num_workers=0).pin_memory
    assert not tile_loader(range(8), sampler, num_workers=0, pin_memory=False).pin_memory
