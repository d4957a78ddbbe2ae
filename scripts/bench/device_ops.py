"""How many operations NCP and the views of a batch ask of a device, and how many bytes these touch; needs no GPU.

    python scripts/bench/device_ops.py --batch 8 64 --lines 15

Tiles of made-up cells, 224 px, nuclei given; two global views of 224 px and eight local ones of 96 px. Counted on the
pretended device of ``tests/gpu_guards``, in the second batch: some things are made once.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / "gpu_guards"), str(ROOT / "scripts" / "bench" / "gpu")]

from common import cells  # noqa: E402
from counted_ops import CountedDevice, Ops, counted  # noqa: E402
from pretend_device import OnDevice  # noqa: E402

from cytossl_monai.transforms import BatchedNCP, ViewGenerator, nuclei_mask  # noqa: E402


def told(name: str, counter: CountedDevice, lines: int, by: str) -> None:
    """The sums, and the lines and functions that ask for most."""
    kinds = {"device": counter.device, "host": counter.host, "looks": counter.looks}
    sums = {kind: (sum(ops.count.values()), sum(ops.touched.values()) / 1e6) for kind, ops in kinds.items()}
    (device, of_device), (host, of_host), (looks, _) = sums.values()
    print(
        f"{name}: {device} operations of the device on {of_device:.0f} MB, {host} of the host on {of_host:.1f} MB, "
        f"{looks} that move nothing"
    )
    for kind, ops in kinds.items():
        if lines and kind in by:
            for key, of in most(ops, lines, by):
                print(f"    {of:12.6g}  {key}")


def most(ops: Ops, lines: int, by: str) -> list[tuple[str, float]]:
    """The functions that ask for most operations (or, by bytes, MB), then single lines."""
    numbers = Counter({key: value / 1e6 for key, value in ops.touched.items()}) if "bytes" in by else ops.count
    functions: Counter[str] = Counter()
    for key, value in numbers.items():
        place, function = key.split(": ")[0].split(" ")
        functions[f"{place.split(':')[0]} {function}"] += value  # type: ignore[assignment]
    return [*functions.most_common(lines), *numbers.most_common(lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--local", type=int, default=8, help="local views")
    parser.add_argument("--lines", type=int, default=0, help="tell so many functions and lines that ask for most")
    parser.add_argument("--by", default="device", choices=["device", "host", "looks", "device bytes"], help="of what")
    parser.add_argument("--preset", nargs="+", default=["default", "published"])
    args = parser.parse_args()
    for batch in args.batch:
        tiles, mpp = cells(batch, 224), torch.full((batch,), 0.5)
        masks = nuclei_mask(tiles, mpp)
        there = OnDevice(tiles), OnDevice(masks)
        for preset in args.preset:
            ncp = BatchedNCP(preset)
            views = ViewGenerator(224, 96, n_local=args.local, ncp=ncp)
            seeds = torch.arange(batch)
            alone = counted(lambda: ncp(*there, mpp, seeds=seeds, check=False))  # noqa: B023
            told(f"NCP {preset}, {batch} tiles", alone, args.lines, args.by)
            generator = torch.Generator()
            every = counted(lambda: views(there[0], mpp, there[1], generator.manual_seed(0)))  # noqa: B023
            told(f"views with NCP {preset}, {batch} tiles", every, args.lines, args.by)


if __name__ == "__main__":
    main()
