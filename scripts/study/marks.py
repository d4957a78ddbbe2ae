"""Marks as a cytologist would set them, out of the truth tables of made-up or composed slides.

    python scripts/study/marks.py --slides slides/slides.csv --number 3 --out marks3 [--seed 0]
    python -m monai.bundle run --config_file bundles/cytossl_mil/configs/cross_validate.json --marks marks3 \
        --slides slides/slides.csv --features_dir features --output_dir mil \
        --overlays "['configs/mil/discriminant.yaml']"

Of each slide that has lesion cells, ``--number`` are drawn and written as points of ``<slide_id>.geojson``, classified
by the slide's label as QuPath would; of a slide that has fewer, all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from cytossl_monai.data import read_slide_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=Path, required=True, help="slide table, with truth/<slide_id>.csv beside it")
    parser.add_argument("--number", type=int, required=True, help="marked cells of a slide")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--lesions", nargs="+", default=["ascus", "asch", "lsil", "hsil", "scc", "agc"], metavar="CLASS"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    total = 0
    for record in read_slide_table(args.slides):
        truth = pd.read_csv(args.slides.parent / "truth" / f"{record.slide_id}.csv")
        lesions = truth[truth["class"].isin(args.lesions)]
        chosen = lesions.iloc[rng.permutation(len(lesions))[: args.number]]
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Point", "coordinates": [cell.x + cell.w / 2, cell.y + cell.h / 2]},
                "properties": {"objectType": "annotation", "classification": {"name": str(record.label)}},
            }
            for cell in chosen.itertuples()
        ]
        if features:
            content = {"type": "FeatureCollection", "features": features}
            (args.out / f"{record.slide_id}.geojson").write_text(json.dumps(content) + "\n")
        total += len(features)
    print(f"{total} cells marked on {len(list(args.out.glob('*.geojson')))} slides: {args.out}")


if __name__ == "__main__":
    main()
