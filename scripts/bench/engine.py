"""What the engine of `scripts/cluster` adds to a slide: the workflow with jobs that do nothing.

    python scripts/bench/engine.py --snakemake .cluster/bin/snakemake --chunks 1 16 64

The workflow is run with `true` in the place of Python: every job starts and ends at once, so that what is left is
Snakemake's own: reading the workflow, working out what is to be done, a shell for each job, logs and marks. CPU time of
it and its jobs, and wall time, which depends on what else the machine does. Two runs with other numbers of chunks tell
a start from a job; a chunk has three jobs.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
JOBS = 3  # a chunk: index, embed, inference


def run(snakemake: str, folder: Path, chunks: int, cores: int) -> tuple[float, float]:
    """One run of the workflow over ``chunks`` chunks in a new folder; CPU and wall seconds."""
    settings = {"slides": folder / "slides.csv", "encoder": folder / "model.pt", "classifier": folder / "classifier.pt"}
    for path in settings.values():
        path.touch()
    config = {**settings, "out": folder / "out", "chunks": chunks, "threads": 1, "python": shutil.which("true")}
    cluster = ROOT / "scripts" / "cluster"
    line = [snakemake, "-q", "all", "-s", str(cluster / "Snakefile"), "--cores", str(cores)]
    line += ["--workflow-profile", str(cluster / "profiles" / "local"), "--directory", str(folder)]
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([*line, "--config", *(f"{k}={v}" for k, v in config.items())], capture_output=True)
    if done.returncode or not (folder / "out" / "chunks" / "merge.done").is_file():
        raise SystemExit(f"engine.py: the workflow failed:\n{done.stderr.decode(errors='replace')[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime), time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snakemake", default="snakemake", help="of requirements-cluster.txt")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--cores", type=int, default=2, help="jobs side by side")
    parser.add_argument("--slides", type=int, default=32, help="slides of a chunk, for the figure a slide")
    args = parser.parse_args()
    if shutil.which(args.snakemake) is None:
        raise SystemExit(f"engine.py: {args.snakemake} is not there; pip install -r requirements-cluster.txt")
    if len(set(args.chunks)) < 2:
        raise SystemExit("engine.py: give at least two numbers of chunks, to tell a start from a job")
    print("| chunks | jobs | CPU s | wall s |\n|---|---|---|---|")
    rows = []
    for chunks in args.chunks:
        with tempfile.TemporaryDirectory() as folder:
            rows.append((JOBS * chunks, *run(args.snakemake, Path(folder), chunks, args.cores)))
        print("| {} | {} | {:.1f} | {:.1f} |".format(chunks, *rows[-1]), flush=True)
    jobs, cpu, wall = np.array(rows, float).T
    for name, values in (("CPU", cpu), ("wall", wall)):
        a_job, start = np.polyfit(jobs, values, 1)
        a_slide = JOBS * a_job / args.slides
        print(f"{name}: {start:.1f} s to start and to merge, {a_job:.3f} s a job, {a_slide:.4f} s a slide")


if __name__ == "__main__":
    main()
