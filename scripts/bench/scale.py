"""Slides an hour by one, two and four processes of one machine, and what starting a job costs: index and embed.

    python scripts/bench/scale.py --slides 8 --size 4096

Made-up slides, tiles as the index cuts them (512 px, seen at 224); an SR-Transformer of the `tiny` size, not trained.
Each process is a shard, as in an array job. Wall time is what a lab waits, and depends on what else the machine does;
CPU time hardly does. The last lines are of a second run, in which everything is current: what a job costs before it
does anything; the slides of a chunk share it.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cytossl_monai.data import make_slides
from cytossl_monai.networks.files import save_encoder
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny

ROOT = Path(__file__).parents[2]


def cpu() -> float:
    """CPU seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def shards(config: str, count: int, arguments: list[str]) -> tuple[float, float]:
    """Run all shards side by side; wall and CPU seconds."""
    wall, used = time.perf_counter(), cpu()
    line = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        str(ROOT / "bundles" / config),
    ]
    processes = [
        subprocess.Popen(
            [*line, *arguments, "--shard", f"{i}/{count}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for i in range(1, count + 1)
    ]
    for process in processes:
        _, error = process.communicate()
        if process.returncode:
            raise SystemExit(error.decode()[-2000:])
    return time.perf_counter() - wall, cpu() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=8)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = make_slides(folder / "slides", args.slides, args.size, num_workers=2, progress=False)
        torch.manual_seed(0)
        save_encoder(folder / "model.pt", Encoder(sr_vit_tiny(), input_size=224), {"name": "untrained"})
        print(f"{args.slides} slides of {args.size} px\n")
        print("| step | processes | wall s | slides an hour | CPU s a slide |\n|---|---|---|---|---|", flush=True)
        common = ["--slides", str(table)]
        for count in args.processes:
            index, features = folder / f"index{count}", folder / f"features{count}"
            steps = {
                "index": (
                    "cytossl_pretrain/configs/index.json",
                    ["--output_dir", str(index), "--num_workers", "0", "--overview", "False"],
                ),
                "embed": (
                    "cytossl_inference/configs/embed.json",
                    ["--index_dir", str(index), "--output_dir", str(features), "--encoder", str(folder / "model.pt"),
                     "--batch_size", "32", "--num_threads", "1", "--progress", "False"],
                ),
            }  # fmt: skip
            for again in (False, True):
                for step, (config, arguments) in steps.items():
                    wall, used = shards(config, count, [*common, *arguments])
                    if again:
                        print(
                            f"| {step}, all current | {count} | {wall:.1f} | | {used / count:.1f} a job |", flush=True
                        )
                    else:
                        hourly, each = 3600 * args.slides / wall, used / args.slides
                        print(f"| {step} | {count} | {wall:.1f} | {hourly:.0f} | {each:.2f} |", flush=True)


if __name__ == "__main__":
    main()
