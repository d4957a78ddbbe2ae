"""Draw one row of pictures: a tile, its nuclei, six ways in which Nuclei-Centered Perturbation shows it.

    python scripts/bench/ncp_row.py --output docs/images/ncp_row.png

Without ``--image`` the tile is cut from a synthetic slide, at its cells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cytossl_monai.data.synthetic.slides import SyntheticSettings, make_slide
from cytossl_monai.transforms import BatchedNCP, nuclei_mask


def six_views(tile: Tensor, mask: Tensor, mpp: float, ops: str, seed: int, donor: Tensor) -> Tensor:
    """Six perturbations of one tile ((3, S, S) uint8); ``donor`` is the tile that backgrounds are swapped with."""
    tiles = torch.stack([tile] * 6 + [donor])
    masks = torch.cat([mask.expand(6, -1, -1, -1), nuclei_mask(donor[None], mpp)])
    return BatchedNCP(ops)(tiles, masks, mpp, torch.Generator().manual_seed(seed))[:6]


def synthetic_field(seed: int, size: int) -> Tensor:
    """(3, size, size) uint8 at 0.5 um per pixel: the part of a synthetic slide that shows most cells."""
    pixels, cells = make_slide(np.random.default_rng(seed), SyntheticSettings(size=2048, mpp=0.5), "hsil")
    centres = np.array([(c.nucleus_x, c.nucleus_y) for c in cells if c.nucleus_w])
    corners = np.stack(np.meshgrid(*[np.arange(0, 2048 - size, size // 4)] * 2), -1).reshape(-1, 1, 2)
    inside = ((centres >= corners + size // 8) & (centres < corners + size - size // 8)).all(-1).sum(1)
    x, y = corners[inside.argmax(), 0]
    return torch.from_numpy(pixels[y : y + size, x : x + size].copy()).permute(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, help="a field; default: a synthetic slide")
    parser.add_argument("--donor", type=Path, help="another field, whose background is swapped in; default: the image")
    parser.add_argument("--mpp", type=float, default=0.5, help="micrometres per pixel of the image")
    parser.add_argument("--x", type=int, default=0)
    parser.add_argument("--y", type=int, default=0)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--ops", default="strong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    def cut(path: Path) -> Tensor:
        pixels = np.asarray(Image.open(path).convert("RGB"))[args.y : args.y + args.size, args.x : args.x + args.size]
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    if args.image is None:
        tile, donor = (synthetic_field(seed, args.size) for seed in (1, 2))
    else:
        tile, donor = cut(args.image), cut(args.donor or args.image)
    mask = nuclei_mask(tile[None], args.mpp)
    views = six_views(tile, mask, args.mpp, args.ops, args.seed, donor)
    panels = [tile, mask[0].to(torch.uint8).mul(255).expand(3, -1, -1), *views]
    gap = torch.full((3, args.size, 4), 255, dtype=torch.uint8)
    strip = torch.cat([part for panel in panels for part in (panel, gap)][:-1], 2)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(strip.permute(1, 2, 0).numpy()).quantize(256).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
