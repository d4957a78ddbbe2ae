"""Does NCP make an encoder look at nuclei? The share of an embedding's change that covering nuclei causes.

    OMP_NUM_THREADS=2 python scripts/bench/ncp_effect.py --cells ../shared/data/cells --steps 400

A small SR-Transformer is pretrained twice with MoCo v3, on the same tiles, for the same steps and from the same seed:
with views whose background is perturbed (NCP, preset ``--ops``) and without. Measured on tiles that neither has seen,
before and after. A tile is changed in two ways:

  nuclei      its nuclei are painted in the colour of glass
  background  an equal area of its cells is: the nuclei's own outlines, moved to where no nucleus is

Embeddings are scaled by their spread over the tiles, dimension by dimension. ``share`` is the squared change that the
first causes over the sum of both: 0.5 says that a pixel of a nucleus matters as much as one of the background. Nuclei
are darker than what surrounds them, so the share in the pixels themselves is printed as well: what a method without any
preference would follow. ``whole`` paints all of the background, not an equal area.

Without ``--cells`` (folders of single-cell crops at 0.25 um per pixel) tiles come from synthetic slides.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cytossl_monai.data.synthetic.cells import LESION_CLASSES
from cytossl_monai.data.synthetic.slides import SyntheticSettings, make_slide
from cytossl_monai.data.tiles.images import cut_field
from cytossl_monai.methods import MoCoV3
from cytossl_monai.metrics import bootstrap_intervals
from cytossl_monai.networks import Encoder, sr_vit_tiny
from cytossl_monai.transforms import BatchedNCP, ViewGenerator, nuclei_mask
from cytossl_monai.transforms.ncp.plate import glass_colour
from cytossl_monai.transforms.nuclei.table import foreground

MPP = 0.5
TILE, VIEW = 128, 96
SHIFTS = 200


def cell_tiles(folder: Path) -> tuple[Tensor, Tensor]:
    """(N, 3, TILE, TILE) uint8: crops of single cells at 0.5 um per pixel, mirrored beyond their border.

    And (N, 4): left, top, right and bottom of their real pixels, which views are cut from.
    """
    tiles, valid = [], []
    for path in sorted(folder.glob("*/*.jpg")):
        image = Image.open(path).convert("RGB")
        small = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BOX)
        width, height = small.size
        tile = cut_field(np.array(small), width / 2, height / 2, TILE)
        tiles.append(torch.from_numpy(np.ascontiguousarray(tile)).permute(2, 0, 1))
        left, top = (max(0, (TILE - side) // 2) for side in (width, height))
        valid.append([left, top, min(TILE, left + width), min(TILE, top + height)])
    return torch.stack(tiles), torch.tensor(valid, dtype=torch.float32)


def synthetic_tiles(slides: int = 10, size: int = 3072) -> Tensor:
    """(N, 3, TILE, TILE) uint8 at 0.5 um per pixel, centred on the cells of synthetic slides."""
    tiles = []
    for number in range(slides):
        lesion = LESION_CLASSES[number // 2 % len(LESION_CLASSES)] if number % 2 else None
        pixels, cells = make_slide(np.random.default_rng([1, number]), SyntheticSettings(size=size), lesion)
        for cell in cells:
            x, y = (round(v - TILE) for v in (cell.x + cell.w / 2, cell.y + cell.h / 2))
            if cell.nucleus_w and 0 <= x <= size - 2 * TILE and 0 <= y <= size - 2 * TILE:
                window = torch.from_numpy(pixels[y : y + 2 * TILE, x : x + 2 * TILE].copy()).permute(2, 0, 1)
                tiles.append(F.avg_pool2d(window.float(), 2).round().to(torch.uint8))
    return torch.stack(tiles)


@dataclass
class Probe:
    """Tiles of VIEW px in [0, 1], plain and painted, (N, 3, VIEW, VIEW), and the nuclei's share of the area."""

    plain: Tensor
    nuclei: Tensor
    background: Tensor
    whole: Tensor
    area: float


def make_probe(tiles: Tensor, limit: int) -> Probe:
    """Paint the tiles in which nuclei, moved, find room on a cell and off every nucleus."""
    start = (TILE - VIEW) // 2
    tiles = tiles[:, :, start : start + VIEW, start : start + VIEW]
    masks = nuclei_mask(tiles, MPP)
    rng = np.random.default_rng(0)
    kept, moved = [], []
    for index, (tile, mask) in enumerate(zip(tiles, masks[:, 0])):
        cells = torch.from_numpy(foreground(tile)) & ~mask
        if not mask.any() or mask.float().mean() > 0.3:
            continue
        best, most = None, 0.0
        for _ in range(SHIFTS):
            step = tuple(int(v) for v in rng.integers(0, VIEW, 2))
            shifted = torch.roll(mask, step, (0, 1))
            on_cell = float((shifted & cells).sum() / mask.sum())
            if not (shifted & mask).any() and on_cell > most:
                best, most = shifted, on_cell
        if best is not None and most > 0.8:
            kept.append(index)
            moved.append(best)
        if len(kept) == limit:
            break
    plain, masks = tiles[kept].float() / 255, masks[kept]
    glass = glass_colour(plain)
    other = torch.stack(moved)[:, None]
    return Probe(
        plain,
        torch.where(masks, glass, plain),
        torch.where(other, glass, plain),
        torch.where(masks, plain, glass),
        float(masks.float().mean()),
    )


def shares(plain: Tensor, nuclei: Tensor, other: Tensor, spread: Tensor) -> np.ndarray:
    """Per tile: the squared change by the nuclei over the sum of both changes."""
    by_nuclei, by_other = (((x - plain) / spread).flatten(1).square().sum(1) for x in (nuclei, other))
    return (by_nuclei / (by_nuclei + by_other).clamp_min(1e-12)).numpy()


@torch.no_grad()
def measure(encoder: nn.Module, probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the nuclei per tile: against an equal area of background, and against all of it."""
    encoder = copy.deepcopy(encoder).eval()
    plain, nuclei, background, whole = (
        torch.cat([encoder(part) for part in x.split(64)])
        for x in (probe.plain, probe.nuclei, probe.background, probe.whole)
    )
    spread = plain.std(0).clamp_min(1e-6)
    return shares(plain, nuclei, background, spread), shares(plain, nuclei, whole, spread)


def build_encoder(seed: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(sr_vit_tiny(img_size=VIEW, patch_size=16, num_layers=6), pool="mean")


def pretrain(tiles: Tensor, valid: Tensor | None, ops: str | None, steps: int, batch: int, seed: int) -> Encoder:
    """MoCo v3 with a small encoder, for so many steps; ``ops`` None leaves NCP out."""
    encoder = build_encoder(seed)
    method = MoCoV3(encoder, hidden_dim=1024).train()
    ncp = None if ops is None else BatchedNCP(ops)
    views = ViewGenerator(VIEW, VIEW, 2, 0, global_scale=(0.3, 1.0), ncp=ncp)
    peak = 2e-3 * batch / 256
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], peak, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    masks = torch.cat([nuclei_mask(part, MPP) for part in tiles.split(64)])
    started = time.perf_counter()
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        for group in optimiser.param_groups:
            group["lr"] = peak * warm * 0.5 * (1 + np.cos(np.pi * step / steps))
        rows = torch.randint(0, len(tiles), (batch,), generator=generator)
        real = None if valid is None else valid[rows]
        loss = method(views(tiles[rows], MPP, masks[rows], generator, valid=real))["loss"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        method.update((step + 1) / steps)
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return encoder


def report(name: str, values: np.ndarray, whole: np.ndarray | None = None) -> None:
    """One line: mean and 95 % interval over the tiles (bootstrap)."""
    interval = bootstrap_intervals(lambda rows: {"mean": float(values[rows].mean())}, len(values))["mean"]
    tail = "" if whole is None else f"   whole {whole.mean():.3f}"
    print(f"{name:24s} share {interval}{tail}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=Path, help="folder of folders of single-cell crops; default: synthetic slides")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ops", nargs="+", default=["default"], help="presets of NCP, one run each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiles", type=int, default=200, help="how many tiles to measure on, at most")
    args = parser.parse_args()

    tiles, valid = (synthetic_tiles(), None) if args.cells is None else cell_tiles(args.cells)
    order = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(tiles)))  # seeds differ in tiles as well
    held_out, train = tiles[order[: len(tiles) // 4]], tiles[order[len(tiles) // 4 :]]
    real = None if valid is None else valid[order[len(tiles) // 4 :]]
    if valid is not None:  # measured are tiles that are real all over what is measured
        edge = (TILE - VIEW) // 2
        box = torch.tensor([edge, edge, TILE - edge, TILE - edge])
        real_boxes = valid[order[: len(tiles) // 4]]
        held_out = held_out[((real_boxes[:, :2] <= box[:2]) & (real_boxes[:, 2:] >= box[2:])).all(1)]
    probe = make_probe(held_out, args.tiles)
    print(
        f"{len(train)} tiles to train on, {len(probe.plain)} to measure on, nuclei cover {probe.area:.1%} of them; "
        f"{args.steps} steps of {args.batch}, seed {args.seed}"
    )
    ones = torch.ones(())
    lines = [
        (
            "pixels",
            shares(probe.plain, probe.nuclei, probe.background, ones),
            shares(probe.plain, probe.nuclei, probe.whole, ones),
        ),
        ("random weights", *measure(build_encoder(args.seed), probe)),
    ]
    for name, ops in (("without NCP", None), *((f"NCP {ops}", ops) for ops in args.ops)):
        print(f"{name}:")
        lines.append((name, *measure(pretrain(train, real, ops, args.steps, args.batch, args.seed), probe)))
    for line in lines:
        report(*line)
    without = lines[2][1]
    for name, share, _ in lines[3:]:
        report(f"{name} less without", share - without)


if __name__ == "__main__":
    main()
