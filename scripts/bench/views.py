"""Views per second: whole batches against one sample at a time in a DataLoader, all in one run.

Compared, on the same tiles and the same machine, taking turns:
  batched   ViewGenerator on batches in the main process, all cores
  ours      this package's per-sample dictionary transforms in a DataLoader with 2 workers
  monai     MONAI's closest per-sample transforms (no stain space, no margin, no donors), the same DataLoader
and the same three for the perturbation alone, masks given. The share of NCP is what the view pipeline costs more with
nuclei found and NCP on than without both.

    OMP_NUM_THREADS=2 python scripts/bench/views.py --batch 64 --size 224

On a machine that other work keeps busy, seconds say more about the others: threads that wait for one another suffer
more than processes that do not. ``--clock cpu`` compares CPU time, one thread each, and leaves the loader out: the
per-sample transforms then cost nothing for workers, collating and passing on, so the ratio is a lower bound.

MONAI's per-sample images carry metadata, which costs time at every step. They do not here, which is in the others'
favour; with ``--track-meta`` they do, as they do for everybody who changes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from monai.data import DataLoader, Dataset, set_track_meta
from monai.transforms import (
    Compose,
    CopyItemsd,
    RandAdjustContrastd,
    RandCoarseDropoutd,
    RandCoarseShuffled,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandRotate90d,
    RandScaleCropd,
    Resized,
    ScaleIntensityRanged,
)
from torch import Tensor

from cytossl_monai.transforms import (
    BatchedNCP,
    RandNucleiCenteredPerturbd,
    RandStainJitterd,
    SegmentNucleid,
    ViewGenerator,
)

MPP = 0.5
GLOBAL, LOCAL, N_LOCAL = 224, 96, 6


def make_tiles(count: int, size: int) -> Tensor:
    """Tiles of pale discs with dark nuclei on glass: (count, 3, size, size) uint8."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    tiles = torch.full((count, 3, size, size), 232.0)
    for tile in tiles:
        for _ in range(6):
            cy, cx, radius = (float(v) for v in torch.rand(3, generator=generator) * torch.tensor([size, size, 30.0]))
            squared = (y - cy) ** 2 + (x - cx) ** 2
            tile[:, squared < (20 + radius) ** 2] *= torch.tensor([[0.72], [0.86], [0.88]])
            tile[:, squared < 64] = torch.tensor([[70.0], [60.0], [110.0]])
    noise = torch.randn(tiles.shape, generator=generator) * 4
    return (tiles + noise).clamp(0, 255).to(torch.uint8)


class MaskedPerturbd:
    """MONAI's intensity transforms on the background: keep the nuclei of ``key`` and perturb the rest."""

    def __init__(self, key: str, mask_key: str) -> None:
        self.key, self.mask_key = key, mask_key
        self.ops = Compose(
            [
                RandCoarseShuffled(key, holes=10, spatial_size=32, prob=0.2),
                RandAdjustContrastd(key, prob=0.5, gamma=(0.6, 1.6)),
                RandGaussianSmoothd(key, sigma_x=(1.3, 4.2), sigma_y=(1.3, 4.2), prob=0.3),
                RandCoarseDropoutd(key, holes=3, spatial_size=32, max_spatial_size=94, fill_value=0.9, prob=0.2),
                RandGaussianNoised(key, std=0.075, prob=0.3),
            ]
        )

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Perturb ``data[key]``."""
        original = data[self.key]
        out = self.ops(data)
        out[self.key] = torch.where(out[self.mask_key] > 0.5, original, out[self.key])
        return out


def per_sample(monai_only: bool) -> Compose:
    """Two global and six local views of one tile, NCP on the second global view, as dictionary transforms."""
    names = ["g0", "g1", *(f"l{i}" for i in range(N_LOCAL))]
    steps: list[Callable[..., Any]] = [
        SegmentNucleid("image", "nuclei", mpp=MPP, method="mask"),
        ScaleIntensityRanged("image", 0, 255, 0, 1),
        CopyItemsd(["image", "nuclei"], len(names), [f"{n}{s}" for n in names for s in ("", "_m")]),
    ]
    for name in names:
        side, scale = (GLOBAL, (0.4, 1.0)) if name[0] == "g" else (LOCAL, (0.05, 0.4))
        both = [name, f"{name}_m"]
        low, high = scale[0] ** 0.5, scale[1] ** 0.5
        steps += [
            RandScaleCropd(both, roi_scale=low, max_roi_scale=high, random_size=True),
            Resized(both, (side, side), mode=("bilinear", "nearest")),
            RandFlipd(both, prob=0.5, spatial_axis=1),
            RandRotate90d(both, prob=0.75, max_k=3),
        ]
        if name == "g1":
            ncp = (
                MaskedPerturbd(name, "g1_m") if monai_only else RandNucleiCenteredPerturbd(name, "default", "g1_m", MPP)
            )
            steps.append(ncp)
        jitter = RandAdjustContrastd(name, prob=0.8, gamma=(0.7, 1.4)) if monai_only else RandStainJitterd(name)
        steps += [jitter, RandGaussianSmoothd(name, sigma_x=(0.1, 2.0), sigma_y=(0.1, 2.0), prob=0.5)]
    return Compose(steps)


def samples_a_second(loader: DataLoader) -> float:
    """Samples that a loader delivers a second, once its workers run.

    When the first batch comes, each worker has about finished one: so many do not count.
    """
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    for _ in batches:
        pass
    return (len(loader.dataset) - loader.num_workers * (loader.batch_size or 1)) / (time.perf_counter() - started)


def clock(work: Callable[[], Any], timer: Callable[[], float] = time.perf_counter) -> float:
    started = timer()
    work()
    return timer() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=5, help="batches a worker makes, of which one is not counted")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU time, one thread, no loader")
    parser.add_argument("--track-meta", action="store_true", help="MONAI's default: per-sample images keep metadata")
    args = parser.parse_args()
    timer = time.process_time if args.clock == "cpu" else time.perf_counter
    if args.clock == "cpu":
        torch.set_num_threads(1)

    set_track_meta(args.track_meta)
    tiles = make_tiles(args.batch, args.size)
    masks = SegmentNucleid("image", "nuclei", mpp=MPP, method="mask")
    nuclei = torch.stack([masks({"image": tile})["nuclei"] for tile in tiles])
    full = ViewGenerator(GLOBAL, LOCAL, 2, N_LOCAL, ncp=BatchedNCP())
    bare = ViewGenerator(GLOBAL, LOCAL, 2, N_LOCAL, find_nuclei=False)
    ncp = BatchedNCP()
    n_views = 2 + N_LOCAL

    items = [{"image": t, "nuclei": m} for t, m in zip(tiles, nuclei)]

    def per_second(transform: Callable[..., Any]) -> float:
        """Samples a second of a per-sample transform."""
        if args.clock == "cpu":
            some = items[: max(1, args.batch // 4)]
            transform(dict(some[0]))
            return len(some) / clock(lambda: [transform(dict(item)) for item in some], timer)
        many = Dataset(items * (args.batches * args.workers), transform)
        return samples_a_second(DataLoader(many, batch_size=args.batch, num_workers=args.workers))

    alone = {
        "ours": RandNucleiCenteredPerturbd("image", "default", mpp=MPP),
        "monai": Compose([ScaleIntensityRanged("image", 0, 255, 0, 1), MaskedPerturbd("image", "nuclei")]),
    }
    full(tiles, MPP)
    rates: dict[str, list[float]] = {}
    shares = []
    for _ in range(args.rounds):
        # The caches are warm and memory is at hand, as for the loaders, whose first batches are not counted either.
        full(tiles, MPP), bare(tiles), ncp(tiles, nuclei, MPP)
        with_ncp, without = clock(lambda: full(tiles, MPP), timer), clock(lambda: bare(tiles), timer)
        shares.append(1 - without / with_ncp)
        timed = {
            "views batched": n_views * args.batch / with_ncp,
            "views ours": n_views * per_second(per_sample(False)),
            "views monai": n_views * per_second(per_sample(True)),
            "ncp batched": args.batch / clock(lambda: ncp(tiles, nuclei, MPP), timer),
            "ncp ours": per_second(alone["ours"]),
            "ncp monai": per_second(alone["monai"]),
        }
        for name, rate in timed.items():
            rates.setdefault(name, []).append(rate)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    metadata = "tracked" if args.track_meta else "off"
    print(f"{args.batch} tiles of {args.size} px, {torch.get_num_threads()} threads, {args.workers} workers")
    print(f"{args.clock} clock, metadata {metadata}")
    for name, rate in middle.items():
        print(f"{name:14s} {rate:8.1f} a second")
    for part in ("views", "ncp"):
        for other in ("ours", "monai"):
            print(f"{part}: batched / {other} = {middle[f'{part} batched'] / middle[f'{part} {other}']:.2f}")
    print(f"NCP with its mask: {statistics.median(shares):.0%} of the view pipeline")


if __name__ == "__main__":
    main()
