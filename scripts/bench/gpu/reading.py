"""Tiles of a JPEG pyramid, decoded on the device and on the host: tiles a second, and the pixels against each other."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import arguments, cells, device_of, figure, seconds_of

from cytossl_monai.data import open_slide, write_pyramid


def main() -> int:
    args = arguments(__doc__).parse_args()
    device = device_of(args.dry)
    side, count, size = (1024, 8, 128) if args.dry else (8192, 256, 256)
    rng = np.random.default_rng(0)
    tile = cells(1, 512)[0].permute(1, 2, 0).numpy()
    image = np.tile(tile, (side // 512, side // 512, 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        write_pyramid(path, image, 0.25)
        places = rng.integers(0, side - size, (count, 2))
        pixels = {}
        for where in dict.fromkeys(["cpu", device.type]):
            with open_slide(path, device=where) as slide:
                print(f"{where}: {slide.backend}", flush=True)
                read = lambda slide=slide: torch.as_tensor(slide.read_regions(places, size, num_workers=4))  # noqa: E731
                pixels[where] = read().cpu()
                seconds = seconds_of(read, device, 1 if args.dry else 5, 1)
            figure(f"decoded on {where}, tiles/s", count / seconds)
    apart = (pixels[device.type].float() - pixels["cpu"].float()).abs()
    figure("largest mean difference of a tile, grey levels", float(apart.flatten(1).mean(1).max()))
    return int(float(apart.flatten(1).mean(1).max()) > 2.0)


if __name__ == "__main__":
    sys.exit(main())
