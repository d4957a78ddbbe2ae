"""What a CPU forgives and a GPU does not: waits for the device in the middle of a step, unusual layouts of memory.

On a CPU every tensor counts as one of the device here: a dispatch mode counts the calls for which a GPU must be waited
for, and a table names how many a step may have and what for.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cytossl_monai.engines import build_optimizer
from cytossl_monai.methods import BYOL, DINO, IBOT, MAE, MoCoV3, SimCLR, SSLMethod
from cytossl_monai.networks import Encoder, sr_vit_tiny
from cytossl_monai.transforms import BatchedNCP, ViewGenerator, nuclei_mask

WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.unique")


class WaitCounter(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a value, and results whose size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).rsplit(".", 1)[0]
        if name.startswith(WAITS):
            self.counts[name] += 1
        if name in ("aten.index", "aten.index_put", "aten.index_put_"):
            indices = args[1] or []
            if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.counts["boolean index"] += 1
        return function(*args, **(kwargs or {}))


HEAD = {"hidden_dim": 32}
METHODS: dict[str, tuple[type[SSLMethod], dict[str, Any]]] = {
    "simclr": (SimCLR, {"dim": 8, **HEAD}),
    "moco_v3": (MoCoV3, {"dim": 8, **HEAD}),
    "byol": (BYOL, {"dim": 8, **HEAD}),
    "dino": (DINO, {"out_dim": 64, "bottleneck_dim": 16, **HEAD}),
    "ibot": (IBOT, {"out_dim": 64, "patch_out_dim": 64, "bottleneck_dim": 16, **HEAD}),
    "mae": (MAE, {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}),
}
ALLOWED: dict[str, int] = {
    "ibot": 4,  # the hidden patches of student and teacher, forward and backward: their number differs between steps
    "mae": 3,  # the same for the patches that are rebuilt
}
"""Waits in forward, backward and update of a step, beside the loss that the trainer looks at: boolean indices alone."""


def method_of(name: str) -> SSLMethod:
    torch.manual_seed(0)
    make, arguments = METHODS[name]
    network = sr_vit_tiny(img_size=32, hidden_size=24, mlp_dim=32, num_layers=1, num_heads=3, num_keys=2)
    return make(Encoder(network), **arguments).train()


def views_of(name: str, seed: int = 0) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {"global": [torch.rand(4, 3, 32, 32, generator=generator) for _ in range(1 if name == "mae" else 2)]}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    method, views = method_of(name), views_of(name)
    optimizer = build_optimizer(method, "adamw", lr=1e-3)
    method(views)["loss"].backward()  # what is made once, at the first step, does not count
    optimizer.step()
    counter = WaitCounter()
    with counter:
        optimizer.zero_grad(set_to_none=True)
        method(views)["loss"].backward()
        method.update(0.1)
    assert sum(counter.counts.values()) <= ALLOWED.get(name, 0), dict(counter.counts)


@pytest.mark.parametrize("name", METHODS)
def test_channels_last_and_strided_views_give_the_same_loss(name: str) -> None:
    views = views_of(name)
    expected = method_of(name)(views)["loss"]
    wide = {key: [torch.stack([v, -v], dim=-1)[..., 0] for v in value] for key, value in views.items()}
    last = {key: [v.contiguous(memory_format=torch.channels_last) for v in value] for key, value in views.items()}
    assert not any(v.is_contiguous() for v in wide["global"])
    for other in (wide, last):
        torch.testing.assert_close(method_of(name)(other)["loss"], expected, rtol=1e-4, atol=1e-5)


def tiles() -> Tensor:
    """(4, 3, 64, 64) uint8 with a dark disc each."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    out = torch.full((4, 3, 64, 64), 235, dtype=torch.uint8)
    for number in range(4):
        disc = (rows - 20 - 5 * number).square() + (columns - 30).square() < 64
        out[number, :, disc] = torch.tensor([[120], [80], [140]], dtype=torch.uint8)
    return out


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


def waits_of_views(batch: int) -> Counter[str]:
    images = tiles().repeat(batch // 4, 1, 1, 1)
    views = ViewGenerator(32, 16, n_local=1, ncp=BatchedNCP("default"))
    counter = WaitCounter()
    with counter:
        views(images, torch.full((batch,), 0.5), generator=torch.Generator().manual_seed(0))
    return counter.counts


def test_the_waits_of_views_do_not_grow_with_the_batch() -> None:
    """Which samples an operation was drawn for, and which boxes, is decided on the host: a number per operation."""
    few, many = waits_of_views(4), waits_of_views(16)
    assert sum(few.values()) <= 110, dict(few)
    assert sum(many.values()) <= 1.25 * sum(few.values()), (dict(few), dict(many))
