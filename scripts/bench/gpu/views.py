"""How much of a ViT-Small step in bf16 is view-making (goal: under 15 %), and what its parts take."""

from __future__ import annotations

import sys

import torch
from common import arguments, autocast, cells, device_of, figure, seconds_of

from cytossl_monai.engines import build_optimizer
from cytossl_monai.methods import DINO
from cytossl_monai.networks import Encoder, sr_vit_tiny, vit_small
from cytossl_monai.transforms import BatchedNCP, ViewGenerator, nuclei_mask


def measure(batch: int, device: torch.device, dry: bool) -> None:
    """Views and a step of DINO for a batch of tiles."""
    size, local, repeats = (64, 32, 1) if dry else (224, 96, 8)
    tiles, mpp = cells(min(batch, 64), size).to(device), torch.full((batch,), 0.5)
    tiles = tiles.repeat(-(-batch // len(tiles)), 1, 1, 1)[:batch]
    ncp = BatchedNCP("default")
    masks = nuclei_mask(tiles, mpp)
    generator = torch.Generator().manual_seed(0)
    views = ViewGenerator(size, local, n_local=2 if dry else 8, ncp=ncp)
    network = sr_vit_tiny(img_size=64, num_layers=1, num_keys=2) if dry else vit_small()
    small = {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16} if dry else {"out_dim": 8192}
    method = DINO(Encoder(network), **small).to(device).train()
    optimizer = build_optimizer(method, "adamw", lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            loss = method(made)["loss"]
        loss.backward()
        optimizer.step()
        method.update(0.1)

    made = views(tiles, mpp, generator=generator)
    parts = {
        "nuclei mask": lambda: nuclei_mask(tiles, mpp),
        "NCP": lambda: ncp(tiles, masks, mpp, generator=generator, check=False),
        "views with NCP, nuclei kept": lambda: views(tiles, mpp, masks=masks, generator=generator),
        "views with NCP, nuclei found": lambda: views(tiles, mpp, generator=generator),
        "step": step,
    }
    seconds = {name: seconds_of(work, device, repeats, warmup=1 if dry else 3) for name, work in parts.items()}
    for name, value in seconds.items():
        figure(f"{name}, ms for {batch} tiles", 1e3 * value)
    for nuclei in ("kept", "found"):
        made_in = seconds[f"views with NCP, nuclei {nuclei}"]
        share = made_in / (made_in + seconds["step"])
        figure(f"goal, views / (views + step), nuclei {nuclei}, {batch} tiles (below 0.15)", share)


def main() -> int:
    args = arguments(__doc__).parse_args()
    for batch in (4,) if args.dry else (64, 256):
        measure(batch, device_of(args.dry), args.dry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
