"""A slide embedded with ViT-S and ViT-L against the bare forward pass on tiles in memory (goal: within 1.2 x)."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import arguments, autocast, cells, device_of, figure, seconds_of

from cytossl_monai.data import SlideRecord, open_slide, write_pyramid
from cytossl_monai.index import IndexSettings, index_slide
from cytossl_monai.inference import embed_tiles
from cytossl_monai.networks import Encoder, SRTransformer, sr_vit_tiny, vit_small


def vit_large() -> SRTransformer:
    """ViT-L/16 at 224 px."""
    return SRTransformer(3, 224, 16, hidden_size=1024, mlp_dim=4096, num_layers=24, num_heads=16, class_token=True)


def main() -> int:
    args = arguments(__doc__).parse_args()
    device = device_of(args.dry)
    side, size, batch = (1024, 64, 4) if args.dry else (8192, 224, 128)
    networks = {"tiny": lambda: sr_vit_tiny(img_size=64, num_layers=1, num_keys=2)} if args.dry else {}
    networks = networks or {"ViT-S": vit_small, "ViT-L": vit_large}
    tile = cells(1, 512)[0].permute(1, 2, 0).numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        write_pyramid(path, np.tile(tile, (side // 512, side // 512, 1)), 0.25)
        index = index_slide(SlideRecord("made-up", path, None, "made-up"), IndexSettings(tile_size=size, mpp=0.5))
        for name, make in networks.items():
            encoder = Encoder(make()).to(device).eval()
            tiles = cells(batch, size).to(device)

            @torch.inference_mode()
            def bare() -> None:
                with autocast(device):
                    encoder(tiles)  # noqa: B023 - called within this turn

            forward = seconds_of(bare, device, 1 if args.dry else 5, 1) / batch
            with open_slide(path) as slide:
                embed = lambda slide=slide: embed_tiles(  # noqa: E731
                    slide,
                    index,
                    encoder,  # noqa: B023
                    batch,
                    device,
                    amp=True,
                    num_threads=os.cpu_count() or 1,
                )
                whole = seconds_of(embed, device, 1, 1) / len(index)
            figure(f"{name}, tiles/s", 1 / whole)
            figure(f"{name}, goal, slide / bare forward (below 1.2)", whole / forward)
    return 0


if __name__ == "__main__":
    sys.exit(main())
