"""Nuclei on the device against the CPU's: the batched mask, and the exact path with CuPy (within 1 % of the pixels)."""

from __future__ import annotations

import importlib.util
import sys

import torch
from common import arguments, cells, device_of, figure, seconds_of

from cytossl_monai.transforms import nuclei_mask, segment_instances


def main() -> int:
    args = arguments(__doc__).parse_args()
    device = device_of(args.dry)
    batch, size = (4, 64) if args.dry else (64, 224)
    tiles = cells(batch, size)
    mpp = torch.full((batch,), 0.5)
    expected = nuclei_mask(tiles, mpp)
    tiles_on_device = tiles.to(device)
    mask = nuclei_mask(tiles_on_device, mpp).cpu()
    differing = float((mask != expected).float().mean())
    figure("batched mask, share of pixels that differ from the CPU's", differing)
    figure(
        "batched mask, tiles/s",
        batch / seconds_of(lambda: nuclei_mask(tiles_on_device, mpp), device, 1 if args.dry else 10, 1),
    )
    wrong = differing > 0.01 or not bool(expected.any())
    if device.type == "cuda" and importlib.util.find_spec("cupy") and importlib.util.find_spec("cucim"):
        worst = 0.0
        for tile in tiles[:8].numpy():
            cpu = segment_instances(tile, 0.5, backend="cpu").labels > 0
            gpu = segment_instances(tile, 0.5, backend="cucim").labels > 0
            worst = max(worst, float((cpu != gpu).mean()))
        figure("exact with CuPy, worst share of pixels that differ", worst)
        wrong = wrong or worst > 0.01
    else:
        print("CuPy or cuCIM is not here: the exact path stays on the CPU", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
