"""Measure inference on a real slide: from file to report, memory, and where the time goes.

    python scripts/bench/inference.py --slide csf-pap.tif

Runs the bundle as a user does, in a process of its own, and reads what it tells of its time. Time and memory do not
depend on the weights: without --encoder and --classifier untrained ones are made. The alternative that embedding is
compared with in the same run reads tile after tile and encodes batch after batch, in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measured_run import measured_run

from cytossl_monai.data import TileIndex, open_slide
from cytossl_monai.inference.embed import EmbedTimes, embed_tiles
from cytossl_monai.networks import ABMIL, MILClassifier, load_encoder, save_classifier, save_encoder
from cytossl_monai.networks.nets import sr_transformer
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash

CONFIG = Path(__file__).resolve().parents[2] / "bundles" / "cytossl_inference" / "configs" / "inference.json"


def make_models(folder: Path, preset: str) -> tuple[Path, Path]:
    """An untrained encoder of a preset and an untrained classifier for it."""
    torch.manual_seed(0)
    encoder = Encoder(getattr(sr_transformer, preset)()).eval()
    save_encoder(folder / "encoder.pt", encoder, {"name": preset})
    known = {"hash": encoder_hash(encoder), "name": preset, "dim": encoder.embed_dim}
    classifier = MILClassifier(ABMIL(encoder.embed_dim, 2), ["negative", "positive"], encoder=known)
    save_classifier(folder / "classifier.pt", classifier)
    return folder / "encoder.pt", folder / "classifier.pt"


def run_bundle(arguments: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in GB of one run of the bundle."""
    run = measured_run(
        [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(CONFIG), *arguments]
    )
    return run.seconds, run.memory


def in_turns(slide_path: Path, index: TileIndex, encoder: Encoder, batch_size: int) -> float:
    """Seconds of the plain way: read a tile, then the next, encode the batch, read on."""
    start = time.perf_counter()
    with open_slide(slide_path) as slide, torch.inference_mode():
        for begin in range(0, len(index), batch_size):
            tiles = [slide.read_region(x, y, index.tile_size, index.mpp) for x, y in index.coords[begin:][:batch_size]]
            encoder(torch.from_numpy(np.stack(tiles)))
    return time.perf_counter() - start


def compare(slide_path: Path, index: TileIndex, encoder: Encoder, batch_size: int, tiles: int) -> None:
    """Embedding against the plain way, in turns on the same tiles, median of three."""
    some = TileIndex(index.table.iloc[np.linspace(0, len(index) - 1, min(tiles, len(index))).astype(int)], index.meta)
    ours, plain = [], []
    for _ in range(3):
        times = EmbedTimes()
        with open_slide(slide_path) as slide:
            embed_tiles(slide, some, encoder, batch_size, num_threads=2, times=times)
        ours.append(times.total)
        plain.append(in_turns(slide_path, some, encoder, batch_size))
    print(
        f"embed {len(some)} tiles   {np.median(plain) / np.median(ours):.2f} x as fast as reading and encoding in turns"
    )
    print(f"of embedding       {times.encoder / times.total:.1%} in the encoder, not waiting for tiles")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, required=True)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--classifier", type=Path, help="trained on --encoder")
    parser.add_argument("--preset", default="sr_vit_tiny", help="network of the untrained encoder")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", type=Path, help="folder to keep; default: a temporary one")
    parser.add_argument("--compare_tiles", type=int, default=128, help="tiles of the comparison; 0 leaves it out")
    arguments, overrides = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        encoder, classifier = arguments.encoder, arguments.classifier
        if encoder is None or classifier is None:
            encoder, classifier = make_models(folder, arguments.preset)
        settings = ["--slide", str(arguments.slide), "--encoder", str(encoder), "--classifier", str(classifier)]
        settings += ["--output_dir", str(folder), "--batch_size", str(arguments.batch_size), "--progress", "False"]
        seconds, memory = run_bundle([*settings, *overrides])
        again, _ = run_bundle([*settings, *overrides])
        prediction = json.loads((folder / arguments.slide.stem / "prediction.json").read_text())
        index = TileIndex.read(folder / "cache" / "index" / f"{arguments.slide.stem}.parquet")
        report = (folder / arguments.slide.stem / "report.html").stat().st_size
        slide, parts = prediction["slide"], prediction["seconds"]
        count, embed, encoding = prediction["tiles"]["count"], parts["embed"], parts["encoder"]
        print(
            f"slide              {slide['width']} x {slide['height']} px, {count} tiles; report {report / 1e6:.1f} MB"
        )
        print(f"encoder            {prediction['encoder']['name']}, {count / encoding:.1f} tiles/s")
        print(f"file to report     {seconds:.1f} s; again, all current: {again:.1f} s")
        print(f"of which           index {parts['index']:.1f} s, embed {embed:.1f} s, in the encoder {encoding:.1f} s")
        print(f"in the encoder     {encoding / seconds:.1%} of the command, {encoding / embed:.1%} of embedding")
        print(f"memory             {memory:.2f} GB at most")
        if arguments.compare_tiles:
            network, _ = load_encoder(encoder)
            compare(arguments.slide, index, network, arguments.batch_size, arguments.compare_tiles)


if __name__ == "__main__":
    main()
