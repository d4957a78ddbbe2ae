"""What `Slide.read_regions` costs beside bare cuCIM calls: ratios of CPU time, taken in turns in one run.

    python scripts/bench/reading.py --slide ../shared/data/wsi/csf-pap.tif

Random 256 px tiles, in random and in sorted order, by one thread: a plain loop of single ``CuImage.read_region`` calls,
cuCIM's batched call, and `Slide.read_regions` in calls of 32 and in one call. Without resampling, all read the
same pixels. With it (1.46 source pixels a pixel), the bare calls read the same source windows and resample each
alone with the package's own exact area average. Each figure is the smallest of ``--rounds``, which are interleaved.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cucim import CuImage

from cytossl_monai.data import Slide, open_slide
from cytossl_monai.data.slides.resample import resample, window_size

SIZE, SCALE = 256, 1.46


def cpu_ms(works: dict[str, Callable[[], object]], tiles: int, rounds: int) -> dict[str, float]:
    """Least CPU milliseconds a tile of each, rounds interleaved: what else the machine does hits all alike."""
    least = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            begin = time.process_time()
            work()
            least[name] = min(least[name], (time.process_time() - begin) / tiles * 1e3)
    return least


def works(slide: Slide, image: CuImage, corners: np.ndarray, resampled: bool) -> dict[str, Callable[[], object]]:
    """The four ways to read tiles at ``corners``."""
    side = window_size(SIZE, SCALE) if resampled else SIZE
    mpp = slide.mpp * SCALE if resampled else None
    start = np.zeros((1, 2))

    def use(pixels: np.ndarray) -> None:
        if resampled:
            resample(pixels[None, ..., :3], start, (SIZE, SIZE), SCALE)

    def single() -> None:
        for x, y in corners.tolist():
            use(np.asarray(image.read_region((x, y), (side, side), level=0)))

    def batched() -> None:
        for batch in image.read_region(corners.tolist(), (side, side), level=0, num_workers=1, batch_size=32):
            for pixels in np.asarray(batch).reshape(-1, side, side, image.shape[-1]):
                use(pixels)

    def in_batches() -> None:
        for i in range(0, len(corners), 32):
            slide.read_regions(corners[i : i + 32], SIZE, mpp)

    def at_once() -> None:
        slide.read_regions(corners, SIZE, mpp)

    return {"single": single, "batched": batched, "read_regions(32)": in_batches, "read_regions(all)": at_once}


def layouts() -> dict[str, Callable[[], object]]:
    """Ways from 32 decoded tiles to the float tensor that an encoder takes: turned by NumPy at once, or later."""
    tiles = np.random.default_rng(0).integers(0, 256, (32, SIZE, SIZE, 3), dtype=np.uint8)

    def planar() -> torch.Tensor:
        out = np.empty((len(tiles), 3, SIZE, SIZE), np.uint8)
        for place, tile in zip(out, tiles):
            place[:] = tile.transpose(2, 0, 1)
        return torch.from_numpy(out)

    def interleaved() -> torch.Tensor:
        out = np.empty_like(tiles)
        for place, tile in zip(out, tiles):
            place[:] = tile
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def later() -> torch.Tensor:
        return interleaved().to(torch.float32, memory_format=torch.contiguous_format)

    return {
        "turned": planar,
        "interleaved": interleaved,
        "turned, then float": lambda: planar().float(),
        "interleaved, then float and turned": later,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="none: only what it costs to turn pixels from interleaved to planar")
    parser.add_argument("--tiles", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.slide is None:
        torch.set_num_threads(1)
        for name, cost in cpu_ms(layouts(), 32, 4 * args.rounds).items():
            print(f"{name}: {cost:.3f} ms a tile")
        return
    image, rng = CuImage(str(args.slide)), np.random.default_rng(0)
    with open_slide(args.slide, backend="cucim") as slide:
        margin = window_size(SIZE, SCALE)
        limits = (slide.width - margin, slide.height - margin)
        random = np.stack([rng.integers(2, limit, args.tiles) for limit in limits], 1)
        row_wise = random[np.lexsort((random[:, 0], random[:, 1] // SIZE))]
        print("| tiles | single | batched | read_regions, calls of 32 | one call | to the better of the two |")
        print("|---|---|---|---|---|---|")
        for resampled in (False, True):
            for name, corners in (("random", random), ("sorted", row_wise)):
                cost = list(cpu_ms(works(slide, image, corners, resampled), args.tiles, args.rounds).values())
                ratios = [value / min(cost[:2]) for value in cost[2:]]
                title = f"{name}, {'resampled' if resampled else 'as scanned'}"
                print(f"| {title} | " + " | ".join(f"{value:.2f} ms" for value in cost), end="")
                print(f" | {ratios[0]:.2f} and {ratios[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
