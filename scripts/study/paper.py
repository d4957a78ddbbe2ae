"""The paper's tables 1 to 3 and its figure 3, on images and slides of yours: arms x seeds, paired, with intervals.

    python scripts/study/paper.py --data DATA --output out/paper                     # small: tables 2 and 3 by cells
    python scripts/study/paper.py --data DATA --output out/paper --scale full        # a GPU
    python scripts/study/paper.py --data DATA --output out/paper --slides            # tables 1 and 2 by slides
    python scripts/study/paper.py --data DATA --output out/paper --figure heads.png  # attention heads, and their masses

DATA holds what configs/study/paper.yaml names; encoders whose weights are not there are left out of the slide-level
tables with a sentence that says which file is missing. Started again it goes on: finished runs stay. Runs go seed by
seed, so a study that is stopped has whole pairs; ``paper.md`` and ``paper.csv`` (``slides.md``, ``slides.csv``) are
written after every run.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cytossl_monai.engines.study.paper import PaperStudy, paper_table, read_paper_study
from cytossl_monai.engines.study.paper_slides import SlideRow, SlideStudy, slide_table
from cytossl_monai.inference import FeatureEmbedder
from cytossl_monai.networks import load_encoder
from cytossl_monai.networks.files import build_encoder
from cytossl_monai.transforms import nuclei_mask
from cytossl_monai.utils import InputError
from cytossl_monai.utils.files import read_torch, write_text
from cytossl_monai.visualize import class_attention, draw_attention_heads, head_masses, tissue_parts

ROOT = Path(__file__).resolve().parents[2]


def draw(study: PaperStudy, path: Path, plain: str, ours: str, count: int) -> None:
    """Figure 3 of two arms' first seed on tiles of each task; the heads' masses go beside it as CSV and are printed.

    A head's mass on a part of the tile is the share of its attention that lies there; its gain is that over the part's
    share of the area: 1 is a head that looks everywhere alike. Means over some 256 of a task's images, each
    alike; beside each arm the same network with random weights.
    """
    rows = []
    for task in study.tasks:
        chosen = np.linspace(0, len(task.images) - 1, count).astype(int)
        attentions = {}
        for arm, trained in itertools.product((plain, ours), (True, False)):
            model = study.folder(study.runs([arm])[0]) / "models" / "model.pt"
            encoder, _ = load_encoder(model)
            if trained:
                attentions[arm] = class_attention(encoder, task.images[chosen]).numpy()
            else:  # what the architecture alone does: few keys are never looked at alike
                torch.manual_seed(0)
                encoder = build_encoder(read_torch(model, "an encoder")).eval()
            named = arm if trained else f"{arm}, random weights"
            masses: dict[str, list[torch.Tensor]] = {}
            for tiles in task.images[:: max(1, len(task.images) // 256)].split(32):
                parts = tissue_parts(tiles / 255, nuclei_mask(tiles, task.mpp))
                for name, values in head_masses(class_attention(encoder, tiles), parts).items():
                    masses.setdefault(name, []).append(values)
            for name, shares in masses.items():
                means = torch.cat(shares).nanmean(0).tolist()
                rows.append(
                    {"task": task.name, "arm": named, "figure": name, **{f"head {i}": v for i, v in enumerate(means)}}
                )
                print(f"{task.name:6s} {named:22s} {name:16s} " + " ".join(f"{v:.2f}" for v in means))
        heads = range(min(3, next(iter(attentions.values())).shape[1]))
        picture = path.with_name(f"{path.stem}_{task.name}{path.suffix}")
        draw_attention_heads(picture, task.images[chosen].numpy(), attentions, list(heads))
    write_text(path.with_suffix(".csv"), pd.DataFrame(rows).to_csv(index=False, float_format="%.4f"))


def by_slides(content: dict[str, Any], study: PaperStudy, args: argparse.Namespace) -> str:
    """Tables 1 and 2 by slides: whatever is missing is indexed, embedded and cross-validated."""

    def embed(**settings: Any) -> None:
        FeatureEmbedder(**settings, device=args.device, progress=False).run()

    slides = SlideStudy(content, study, embed)
    rows: list[SlideRow] = []
    table = slide_table(content, rows, absent=slides.absent)
    for cell in slides.cells(args.encoders, args.methods):
        rows.append(slides.row(*cell))
        table = slide_table(content, rows, absent=slides.absent)
        write_text(args.output / "slides.md", table)
        pd.DataFrame([row.plain() for row in rows]).to_csv(args.output / "slides.csv", index=False)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/study/paper.yaml")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scale", default="small")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, help="of those of the study; default: all")
    parser.add_argument("--slides", action="store_true", help="tables 1 and 2 by slides; arms are trained where needed")
    parser.add_argument("--encoders", nargs="+", help="with --slides: only these rows")
    parser.add_argument("--methods", nargs="+", help="with --slides: only these MIL methods")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the evaluation")
    parser.add_argument("--figure", type=Path, help="draw figure 3 from what is trained, and train nothing")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        content = read_paper_study(args.config, args.scale)
        if args.seeds is not None:
            content["seeds"] = [seed for seed in content["seeds"] if seed in args.seeds]
        study = PaperStudy(content, args.data, args.output, ROOT)
        if args.figure:
            draw(study, args.figure, "dino", "all", 6)
            return
        if args.slides:
            print(by_slides(content, study, args))
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
