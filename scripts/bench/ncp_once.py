"""What NCP costs once a tile, as published, beside once a view: the same views of the same batches, in turns.

    OMP_NUM_THREADS=1 python scripts/bench/ncp_once.py --rounds 8

Two global views of 224 px and eight local ones of 96 px of tiles of 512 px (or ``--size``), nuclei given, so that
nothing is counted but the views. Time is that of the processor, of one thread. Each round makes the views of one batch
without NCP, with NCP once a tile, and with NCP on every view, in another order each time; figures are medians of the
rounds, and of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np
import torch
from torch import Tensor

from cytossl_monai.transforms import BatchedNCP, ViewGenerator

MPP = 0.25


def batch(count: int, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Tiles of noise with a nucleus (8 um) for every 64 x 64 px, and their masks."""
    tiles = torch.from_numpy(rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8))
    masks = torch.zeros(count, 1, size, size, dtype=torch.bool)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for tile in masks:
        for cy, cx in rng.integers(16, size - 16, ((size // 64) ** 2, 2)):
            tile[0] |= (y - cy) ** 2 + (x - cx) ** 2 <= 16**2
    return tiles, masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--ops", default="published", help="preset of NCP")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ncp = BatchedNCP(args.ops)
    makers = {
        "no NCP": ViewGenerator(224, 96, 2, 8),
        "once a tile": ViewGenerator(224, 96, 2, 8, ncp=ncp, ncp_views="tile"),
        "on every view": ViewGenerator(224, 96, 2, 8, ncp=ncp, ncp_views="all"),
    }
    tiles, masks = batch(args.batch, args.size, np.random.default_rng(0))
    for make in makers.values():  # the first call of each does not count
        make(tiles[:2], MPP, masks[:2])
    orders = itertools.cycle(itertools.permutations(makers))
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for number, order in zip(range(args.rounds), orders):
        for name in order:
            begun = time.process_time()
            makers[name](tiles, MPP, masks, torch.Generator().manual_seed(number))
            seconds[name].append(time.process_time() - begun)
    for name, each in seconds.items():
        print(f"{name:14s} {1000 * np.median(each) / args.batch:7.1f} ms a tile (CPU)")
    once, every, none = (np.array(seconds[name]) for name in ("once a tile", "on every view", "no NCP"))
    ratio, cost = every / once, (every - none) / (once - none)
    print(f"views with NCP on every view take {np.median(ratio):.2f} times those with NCP once a tile "
          f"({ratio.min():.2f} to {ratio.max():.2f} over {args.rounds} rounds)")  # fmt: skip
    print(f"NCP alone: {np.median(cost):.1f} times ({cost.min():.1f} to {cost.max():.1f})")


if __name__ == "__main__":
    main()
