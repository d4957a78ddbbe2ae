"""Method x {plain, +NCP, +SR, +both} at equal steps, judged by kNN and a linear probe; one table at the end.

    python scripts/study/ablation.py --config configs/study/ablation.yaml --data DATA --output out/ablation

Every run is done with each of the study's seeds, in ``<output>/seed<n>/<method>/<arm>``, seed by seed, so that a study
that is stopped has whole pairs. Start the same command again after an interruption: runs that are done are not done
again, one that was killed goes on from its last checkpoint. On many machines, each does a shard of the runs
(--shard 3/8). Writes ablation.csv, ablation.md and ablation.png, anew after every run: means over the seeds, and gains
paired over them.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
import yaml

from cytossl_monai.engines.study.ablation import ARMS, AblationStudy, read_study
from cytossl_monai.engines.study.table import markdown_table, write_table
from cytossl_monai.utils import InputError, choose_shard, plain_errors

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    plain_errors()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/study/ablation.yaml", help="the study")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data, @data_root in the study")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", help="default: all of the study")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="of those of the study; default: all")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the bundle, over the study's")
    parser.add_argument("--shard", help="i/n: only these runs, and no tables; default: as an array job says, else all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the evaluation")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    extra = {}
    for pair in args.set:
        key, separator, value = pair.partition("=")
        if not separator:
            parser.error(f"--set takes KEY=VALUE, not {pair!r}")
        if key == "seed":  # every run has one of the study's
            parser.error("--set seed has no effect: give --seeds, or change seeds in the study")
        extra[key] = yaml.safe_load(value)
    try:
        content = read_study(args.config)
        seeds = [seed for seed in content["seeds"] if args.seeds is None or seed in args.seeds]
        if not seeds:
            raise InputError(f"none of the seeds {args.seeds} is one of {args.config}, which has {content['seeds']}")
        part = choose_shard(args.shard)
        rows: list[dict[str, Any]] = []
        number = 0
        for seed in seeds:
            folder = args.output / f"seed{seed}"
            study = AblationStudy(content, args.data, folder, ROOT, {**extra, "seed": seed})
            runs = part.select(study.runs(args.methods, args.arms), lambda run: f"seed{seed}/{run.name}")  # noqa: B023
            number += len(runs)
            for run in runs:
                rows += [{**row, "seed": seed} for row in study.rows([run.method], [run.arm], args.device)]
                if part.count == 1:
                    write_table(rows, args.output)
            if part.count == 1:
                rows += [{**row, "seed": seed} for row in study.untrained_rows(runs, args.device)]
                write_table(rows, args.output)
        if part.count > 1:
            print(f"ablation: {number} runs of shard {part} are done; run once more with --shard 1/1 for the tables")
            return
    except InputError as error:
        raise SystemExit(f"ablation: {error}") from error
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
