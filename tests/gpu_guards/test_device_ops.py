"""How much a batch asks of a device: a small batch takes as long as the host takes to name the operations.

They must not grow with the batch nor with the number of local views, so a Python loop of operations has no place in
making views, were it over channels, donors, levels or parameters. These are counts, never times.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from counted_ops import CountedDevice, counted
from pretend_device import DEVICE, OnDevice
from small_steps import tiles

from cytossl_monai.transforms import BatchedNCP, ViewGenerator, nuclei_mask

MOST: dict[str, dict[str, tuple[int, int]]] = {
    "published": {"ncp": (123, 362), "views": (240, 1154)},
    "default": {"ncp": (222, 638), "views": (401, 1533)},
}
"""At most so many operations of the device, and so many that the host names in all, its own and mere looks included."""


def asked(preset: str, part: str, batch: int, n_local: int = 1) -> CountedDevice:
    """What NCP, or views with it, ask for; nuclei are given."""
    images, mpp = tiles().repeat(batch // 4, 1, 1, 1), torch.full((batch,), 0.5)
    there, masks = OnDevice(images), OnDevice(nuclei_mask(images, mpp))
    ncp, seeds = BatchedNCP(preset), torch.arange(batch)
    if part == "ncp":
        return counted(lambda: ncp(there, masks, mpp, seeds=seeds, check=False))
    views, generator = ViewGenerator(32, 16, n_local=n_local, ncp=ncp), torch.Generator()
    return counted(lambda: views(there, mpp, masks, generator.manual_seed(0)))


def most_by(counter: CountedDevice) -> list[tuple[str, int]]:
    """The functions that ask for most, for whoever must find out what was added."""
    functions: Counter[str] = Counter()
    for key, count in counter.device.count.items():
        functions[key.split(": ")[0].split(" ")[1]] += count
    return functions.most_common(12)


@pytest.mark.parametrize("preset", MOST)
@pytest.mark.parametrize("part", ["ncp", "views"])
def test_operations_do_not_grow(preset: str, part: str) -> None:
    device, named = MOST[preset][part]
    sizes = [(4, 1), (32, 1), (64, 1)] if part == "ncp" else [(4, 1), (32, 4), (64, 8)]
    for batch, n_local in sizes:
        counter = asked(preset, part, batch, n_local)
        assert counter.device.count.total() <= device, (batch, n_local, most_by(counter))
        assert counter.named() <= named, (batch, n_local, counter.named())


def test_the_counter_tells_work_from_looks() -> None:
    with CountedDevice() as counter:
        x = torch.zeros(4, 8, device=DEVICE)
        for row in x.view(2, 16).unsqueeze(0).unbind(1):
            row.expand(3, 16).transpose(0, 1)
            torch.empty_like(row)
        assert counter.device.count.total() == 1
        for row in x.unbind():
            row.add_(1.0)
        assert counter.device.count.total() == 5
        x + x
        torch.arange(3) + 1
    # Written; read and written; twice read and written.
    assert counter.device.touched.total() == 4 * 32 + 2 * 4 * 32 + 3 * 4 * 32
    assert counter.host.count.total() == 2
    assert counter.named() > 10
