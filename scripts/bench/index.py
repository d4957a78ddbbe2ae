"""Measure the index on a real slide: how many nuclei it keeps, how many kept tiles are without one, time and memory.

    python scripts/bench/index.py --slide csf-pap.tif --workers 2

The yardstick is `segment_instances` at the slide's full resolution: on random fields that hold nuclei, which share of
the nuclei lies in kept tiles (a nucleus is where its centre is); on random kept tiles, which share holds no nucleus.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from measured_run import measured_run

from cytossl_monai.data import Slide, TileIndex, open_slide
from cytossl_monai.transforms import segment_instances

CONFIG = Path(__file__).resolve().parents[2] / "bundles" / "cytossl_pretrain" / "configs" / "index.json"


def run_index(slide: Path, folder: Path, workers: int, overrides: list[str]) -> tuple[float, float, float, TileIndex]:
    """Index one slide as a user does; returns seconds, CPU seconds, peak memory in GB and the index."""
    (folder / "slides.csv").write_text(f"slide_id,path\nslide,{slide.resolve()}\n")
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(CONFIG), *overrides]
    command += ["--slides", str(folder / "slides.csv"), "--output_dir", str(folder), "--num_workers", str(workers)]
    run = measured_run(command)
    return run.seconds, run.cpu, run.memory, TileIndex.read(folder / "slide.parquet")


def nuclei_in(slide: Slide, x: int, y: int, size: int, margin: int = 64) -> np.ndarray:
    """Centres (N, 2) of the nuclei of a field, level-0 pixels, by the exact segmentation with context around it."""
    image = slide.read_region(x - margin, y - margin, size + 2 * margin)
    table = segment_instances(image, slide.mpp).table
    centres = table[["x", "y"]].to_numpy() + 0.5 - margin
    inside = ((centres >= 0) & (centres < size)).all(1)
    return centres[inside] + (x, y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fields", type=int, default=40, help="random 1024 px fields with nuclei")
    parser.add_argument("--tiles", type=int, default=200, help="random kept tiles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the index and its picture; default: a temporary one")
    parser.add_argument("--list", type=Path, help="write misses and empty tiles to this JSON file, to look at them")
    arguments, overrides = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "slide.parquet").unlink(missing_ok=True)
        seconds, cpu, memory, index = run_index(arguments.slide, folder, arguments.workers, overrides)
    rng = np.random.default_rng(arguments.seed)
    slide = open_slide(arguments.slide)
    size = int(index.table["size"].iloc[0])
    kept = set(zip(index.table.x // size, index.table.y // size))

    fields, nuclei, missed = 0, 0, []
    while fields < arguments.fields:
        x, y = int(rng.integers(slide.width - 1024)), int(rng.integers(slide.height - 1024))
        centres = nuclei_in(slide, x, y, 1024)
        if len(centres):
            fields += 1
            nuclei += len(centres)
            missed += [c.tolist() for c in centres if (int(c[0] // size), int(c[1] // size)) not in kept]
    sample = index.table.iloc[rng.permutation(len(index))[: arguments.tiles]]
    empty = [(int(x), int(y)) for x, y in zip(sample.x, sample.y) if not len(nuclei_in(slide, x, y, size))]

    print(f"slide             {slide.width} x {slide.height} px at {slide.mpp:.4f} um/px")
    print(f"tiles             {len(index)} kept of {index.meta['tiles']}")
    print(f"nuclei in tiles   {1 - len(missed) / nuclei:.2%} of {nuclei} in {fields} fields")
    print(f"tiles without     {len(empty) / len(sample):.2%} of {len(sample)}")
    print(f"time              {seconds:.1f} s, {cpu:.1f} s of CPU, {arguments.workers} workers")
    print(f"memory            {memory:.2f} GB")
    if arguments.list:
        arguments.list.write_text(json.dumps({"missed": missed, "empty": empty}))


if __name__ == "__main__":
    main()
