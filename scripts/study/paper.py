"""The paper's tables 2 and 3 and its figure 3, on images of yours: arms x seeds, paired, with intervals.

    python scripts/study/paper.py --data DATA --output out/paper                     # small: two CPU cores, an hour
    python scripts/study/paper.py --data DATA --output out/paper --scale full        # a GPU
    python scripts/study/paper.py --data DATA --output out/paper --figure heads.png  # attention heads

DATA holds what configs/study/paper.yaml names. Started again it goes on: finished runs stay. Runs go seed by seed, so a
study that is stopped has whole pairs; ``paper.md`` and ``paper.csv`` are written after every run.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cytossl_monai.engines.study.paper import PaperStudy, paper_table, read_paper_study
from cytossl_monai.networks import load_encoder
from cytossl_monai.transforms import nuclei_mask
from cytossl_monai.utils import InputError
from cytossl_monai.utils.files import write_text
from cytossl_monai.visualize import class_attention, draw_attention_heads, head_masses, tissue_parts

ROOT = Path(__file__).resolve().parents[2]


def draw(study: PaperStudy, path: Path, plain: str, ours: str, count: int) -> None:
    """Figure 3: heads of two arms' first seed on tiles of the first task; each head's gain on the parts is printed."""
    task = study.tasks[0]
    chosen = np.linspace(0, len(task.images) - 1, count).astype(int)
    tiles = task.images[chosen]
    parts = tissue_parts(tiles / 255, nuclei_mask(tiles, task.mpp))
    attentions = {}
    for arm in (plain, ours):
        encoder, _ = load_encoder(study.folder(study.runs([arm])[0]) / "models" / "model.pt")
        attention = class_attention(encoder, tiles)
        attentions[arm] = attention.numpy()
        for name, values in head_masses(attention, parts).items():
            print(f"{arm:8s} {name:16s} " + " ".join(f"{v:.2f}" for v in values.nanmean(0).tolist()))
    heads = range(min(3, next(iter(attentions.values())).shape[1]))
    draw_attention_heads(path, tiles.numpy(), attentions, list(heads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/study/paper.yaml")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scale", default="small")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the evaluation")
    parser.add_argument("--figure", type=Path, help="draw figure 3 from what is trained, and train nothing")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        content = read_paper_study(args.config, args.scale)
        study = PaperStudy(content, args.data, args.output, ROOT)
        if args.figure:
            draw(study, args.figure, "dino", "all", 6)
            return
        rows: list[dict[str, Any]] = []
        for run in study.runs(args.arms):
            study.train(run)
            rows += study.evaluate(run, args.device)
            table = paper_table(content, rows)
            write_text(args.output / "paper.md", table)
            pd.DataFrame(rows).to_csv(args.output / "paper.csv", index=False)
    except InputError as error:
        raise SystemExit(f"paper: {error}") from error
    print(table)


if __name__ == "__main__":
    main()
