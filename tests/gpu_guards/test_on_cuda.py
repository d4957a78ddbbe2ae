"""The guards on a CUDA device itself: results, waits, autocast, recorded graphs, pinned memory.

`test_device_waits` holds the same on a pretended device, which has no kernels of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_steps import ALLOWED, METHODS, method_of, take_step, tiles, views_of

from cytossl_monai.data.tiles.loader import tile_loader
from cytossl_monai.engines import build_optimizer
from cytossl_monai.transforms import BatchedNCP, ViewGenerator
from cytossl_monai.utils.device_results import one_behind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Products in float32 as the CPU has them, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_the_cpus_and_wait_for_what_is_named(name: str) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        method = method_of(name).to(device)
        views = {key: [view.to(device) for view in value] for key, value in views_of(name).items()}
        optimizer, found = build_optimizer(method, "adamw", lr=1e-3), []
        for step in range(3):
            torch.manual_seed(step)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if device == "cuda" and step == 2:  # some things are made once, at the first
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    found.append(take_step(method, views, optimizer))
                finally:
                    if device == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
        waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        assert len(waits) <= sum(ALLOWED.get(name, {}).values()), waits
        losses[device] = [float(loss) for loss in found]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-3)


@pytest.mark.parametrize("ncp", ["published", "default"])
def test_views_are_the_cpus(ncp: str) -> None:
    """Pixels within three grey levels, but for one in a hundred, where a threshold fell to the other side."""
    views = ViewGenerator(32, 16, n_local=1, ncp=BatchedNCP(ncp))
    mpp = torch.full((4,), 0.5)
    here = views(tiles(), mpp, generator=torch.Generator().manual_seed(0))
    there = views(tiles().cuda(), mpp, generator=torch.Generator().manual_seed(0))
    for key in ("global", "local"):
        for a, b in zip(here[key], there[key], strict=True):
            assert b.is_cuda
            apart = (a.float() - b.cpu().float()).abs()
            assert float((apart > 3 / 255 * float(a.float().abs().max())).float().mean()) < 0.01


def test_autocast_of_the_device_is_used() -> None:
    method = method_of("simclr").cuda()
    views = {key: [view.cuda() for view in value] for key, value in views_of("simclr").items()}
    seen = set()
    for module in method.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = method(views)["loss"]
    assert torch.bfloat16 in seen
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["simclr", "dino"])
def test_a_recorded_graph_gives_the_same_losses(name: str) -> None:
    """``compile`` with ``mode: reduce-overhead``: the first steps record, the later ones replay."""
    losses = []
    for compiled in (False, True):
        method = method_of(name).cuda()
        call = torch.compile(method, mode="reduce-overhead") if compiled else method
        views = {key: [view.cuda() for view in value] for key, value in views_of(name).items()}
        optimizer, found = build_optimizer(method, "adamw", lr=1e-3), []
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            found.append(float(take_step(method, views, optimizer, call)))
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_batches_come_pinned() -> None:
    items = [{"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "mpp": 0.5} for _ in range(2)]
    sampler: Any = [[0, 1]]
    batch = next(iter(tile_loader(items, sampler, num_workers=0)))
    assert all(batch[name].is_pinned() for name in ("image", "mpp"))


def test_results_of_a_gpu_arrive_whole() -> None:
    """Each is overwritten on the device as soon as the next work runs: what is read must be the copy made before."""
    place = torch.empty(2_000_000, device="cuda")

    def work() -> Iterator[torch.Tensor]:
        for i in range(20):
            yield place.fill_(i)

    assert [(array.min(), array.max()) for array in one_behind(work())] == [(i, i) for i in range(20)]
