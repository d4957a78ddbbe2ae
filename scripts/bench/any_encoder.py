"""What embedding costs beside the encoder's bare forward pass: ViT-L/16 at 224 px, with random weights.

    python scripts/bench/any_encoder.py --tiles 16 --repeats 3

Three things are timed by turns: the bare forward pass of a plain ViT-L written here with PyTorch's own attention, the
forward pass of this package's network with the same weights, and `embed_tiles` on a synthetic slide: reading,
normalising, encoding, pooling. Every one gets the same batches. The least time of each is told, on the wall and, on a
CPU, of all processor cores together, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.data import make_slides, open_slide, read_slide_table
from cytossl_monai.index import IndexSettings, index_slide
from cytossl_monai.inference import embed_tiles
from cytossl_monai.networks import Encoder, card_network, read_card

CARD = Path(__file__).parents[2] / "configs" / "encoders" / "uni.yaml"


class PlainViT(nn.Module):
    """A ViT-L as it is written in a page, on the parameters of the network that it is compared with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Class token of normalised images (B, 3, H, W)."""
        own = self.network
        x = own.patch_embedding.patch_embeddings(images).flatten(2).transpose(1, 2)
        x = x + own.patch_embedding.position_embeddings
        x = torch.cat([own.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in own.blocks:
            y = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*y).transpose(1, 2).flatten(2)
            x = x + block.scale1(block.attn.out_proj(y))
            y = block.mlp.linear2(F.gelu(block.mlp.linear1(block.norm2(x))))
            x = x + block.scale2(y)
        return own.norm(x)[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    network = card_network(read_card(CARD), None).to(device).eval()
    encoder, plain = Encoder(network).to(device).eval(), PlainViT(network)
    with tempfile.TemporaryDirectory() as folder:
        side = 448 * (int(args.tiles**0.5) + 2)
        record = read_slide_table(make_slides(folder, 1, side, density=900.0, seed=0, progress=False))[0]
        index = index_slide(record, IndexSettings(min_nuclei=0, min_sharpness=0.0))
        index.table = index.table.iloc[: args.tiles].reset_index(drop=True)
        with open_slide(record.path) as slide:
            tiles = torch.as_tensor(slide.read_regions(index.coords, 224, index.mpp))
            batches = [encoder.normalise(part)[1].cpu() for part in tiles.to(device).split(args.batch_size)]

            def run(network: Callable[[Tensor], object]) -> None:
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    for batch in batches:
                        network(batch.to(device))

            ways: dict[str, Callable[[], object]] = {
                "bare forward pass, plain ViT-L": lambda: run(plain),
                "forward pass, SRTransformer": lambda: run(network),
                "embed_tiles, from the slide": lambda: embed_tiles(
                    slide, index, encoder, args.batch_size, device, args.amp
                ),
            }
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for turn in range(args.repeats + 1):  # the first round warms up
                for name, way in ways.items():
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    start, cpu_start = time.perf_counter(), time.process_time()
                    way()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    times[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
                    wall, cpu = times[name][-1]
                    print(f"round {turn}: {name:34s} {wall:8.2f} s, {cpu:8.2f} s of processor", flush=True)
    threads = torch.get_num_threads()
    print(f"ViT-L/16, {len(tiles)} tiles of 224 px, batches of {args.batch_size}, {device}, {threads} threads")
    base = [min(values) for values in zip(*times["bare forward pass, plain ViT-L"][1:])]
    for name, values in times.items():
        wall, cpu = (min(part) for part in zip(*values[1:]))
        line = f"{name:34s} {1000 * wall / len(tiles):9.1f} ms a tile  {wall / base[0]:5.2f} x"
        if device.type == "cpu":
            line += f"  {1000 * cpu / len(tiles):9.1f} ms of processor  {cpu / base[1]:5.2f} x"
        print(line)


if __name__ == "__main__":
    main()
