"""Table of MIL method x encoder: out-of-fold AUC with interval, by the same patient-wise folds for all.

For each method also what the first encoder gains over each other one: the difference of their AUCs on the same slides,
with an interval from the same draws of patients for both.

python scripts/study/mil.py --slides slides.csv --encoder ours=features_a --encoder random=features_b --output study
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cytossl_monai.data import read_slide_table
from cytossl_monai.engines.mil.cross_validate import CrossValidation, cross_validate
from cytossl_monai.metrics import classification_metrics
from cytossl_monai.metrics.bootstrap import Interval, bootstrap_metric
from cytossl_monai.utils.files import atomic_path, write_text
from cytossl_monai.utils.program import plain_errors

ROOT = Path(__file__).resolve().parents[2]
METHODS = [
    "mean",
    "max",
    "abmil",
    "abmil_gated",
    "dsmil",
    "clam_sb",
    "clam_mb",
    "transmil",
    "dtfd",
    "discriminant",
    "monai_att_trans",
]


def main() -> None:
    plain_errors()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", required=True, help="slide table with labels")
    parser.add_argument("--encoder", action="append", required=True, metavar="NAME=FEATURES_DIR")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names of the overlays in configs/mil")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    first: dict[str, CrossValidation] = {}
    for encoder in args.encoder:
        name, _, folder = encoder.partition("=")
        if not folder:
            parser.error(f"--encoder takes NAME=FEATURES_DIR, not {encoder!r}")
        for method in args.methods:
            result = cross_validate(
                ROOT / "bundles/cytossl_mil/configs/train.json",
                args.slides,
                folder,
                args.output / name / method,
                n_folds=args.folds,
                seed=args.seed,
                overlays=[ROOT / f"configs/mil/{method}.yaml"],
                overrides={"epochs": args.epochs},
            )
            rows += [
                {"encoder": name, "method": method, "metric": metric, **interval.as_dict()}
                for metric, interval in result.intervals.items()
            ]
            reference = first.setdefault(method, result)
            if reference is not result:
                gain = auc_gain(reference, result, args.slides)
                rows.append({"encoder": name, "method": method, "metric": "gain_of_first", **gain.as_dict()})
            # Written after every cell: a study that is stopped has what it did, and goes on from there.
            table = pd.DataFrame(rows)
            with atomic_path(args.output / "mil_study.csv") as partial:
                table.to_csv(partial, index=False, float_format="%.4f")
            write_text(args.output / "mil_study.md", markdown(table))
    print(markdown(pd.DataFrame(rows)))


def auc_gain(one: CrossValidation, other: CrossValidation, slides: str, n_resamples: int = 2000) -> Interval:
    """AUC of one minus AUC of the other, on the slides that both predicted; patients are drawn for both alike."""
    patient = {record.slide_id: record.patient_id for record in read_slide_table(slides)}
    place = {slide: i for i, slide in enumerate(other.slides)}
    rows = np.array([i for i, slide in enumerate(one.slides) if slide in place])
    paired = np.array([place[one.slides[i]] for i in rows])

    def difference(labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> float:
        return classification_metrics(labels, ours)["auc"] - classification_metrics(labels, theirs)["auc"]

    labels = one.labels[rows]
    return bootstrap_metric(
        difference,
        labels,
        one.probabilities[rows],
        other.probabilities[paired],
        groups=[patient[one.slides[i]] for i in rows],
        strata=labels,
        n_resamples=n_resamples,
    )


def markdown(table: pd.DataFrame) -> str:
    """AUC with 95 % interval, one row a method, one column an encoder; then the gains of the first encoder."""
    encoders = list(dict.fromkeys(table["encoder"]))
    text = _block(table, "auc", encoders)
    if len(encoders) > 1:
        text += f"\nAUC of {encoders[0]} minus that of:\n\n" + _block(table, "gain_of_first", encoders[1:])
    return text


def _block(table: pd.DataFrame, metric: str, encoders: list[str]) -> str:
    auc = table[table["metric"] == metric]
    lines = ["| method | " + " | ".join(encoders) + " |", "|---" * (len(encoders) + 1) + "|"]
    for method in dict.fromkeys(auc["method"]):
        cells = []
        for encoder in encoders:
            figures = auc[(auc["encoder"] == encoder) & (auc["method"] == method)]
            cells += [f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f})" for r in figures.itertuples()] or ["-"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
