"""Print what a run of ``scripts/demo.sh`` made and how well it did.

.venv/bin/python scripts/demo_summary.py demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd


def main(out: Path) -> None:
    metrics = json.loads((out / "mil" / "metrics.json").read_text(encoding="utf-8"))
    print(f"\n== done: {metrics['n_slides']} slides of {metrics['n_patients']} patients, out-of-fold")
    for name, title in (("auc", "slide AUC"), ("balanced_accuracy", "balanced accuracy")):
        value = metrics["metrics"][name]
        print(f"{title:<19}{value['value']:.3f}  (95 % interval {value['low']:.3f} to {value['high']:.3f})")
    reports = out / "reports"
    answers = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(reports.glob("*/prediction.json"))]
    labels = [f"{a['slide_id']}: {a['label']} ({a['suspicion']:.2f})" for a in answers if a.get("label") is not None]
    print(f"{'new slides':<19}{'; '.join(labels) or 'none with cells'}")
    for title, path in (
        ("encoder", out / "pretrain" / "models" / "model.pt"),
        ("training curves", out / "pretrain" / "curves.png"),
        ("slide classifier", out / "mil" / "model.pt"),
        ("predictions", out / "mil" / "predictions.csv"),
        ("ROC", out / "mil" / "roc.png"),
        ("reports", reports / "index.html"),
        *((title, next(iter(sorted(reports.glob(f"*/{name}"))), None)) for title, name in EVIDENCE),
    ):
        if path is not None and path.is_file():
            print(f"{title:<19}{path}")
    seconds = _seconds(out)
    if seconds:
        print(f"{'time in slides':<19}{seconds}")
    print("Research use only: nothing here is a diagnosis.")


EVIDENCE = (("heatmap", "overlay.png"), ("gallery", "gallery.png"))


def _seconds(out: Path) -> str:
    """Seconds that the reports of the steps name, summed over their slides."""
    times = []
    for step in ("index", "features", "reports"):
        path = out / step / "report.csv"
        if path.is_file():
            times.append(f"{step} {pd.read_csv(path)['seconds'].sum():.0f} s")
    return ", ".join(times)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
