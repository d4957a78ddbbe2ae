"""Measure whether the evidence of slide inference finds the lesion cells.

    python scripts/bench/evidence.py --slides slides/slides.csv --inference inference_dir
    python scripts/bench/evidence.py --slides slides/slides.csv --encoder model.pt --classifier classifier.pt
    python scripts/bench/evidence.py --slides slides/slides.csv --folds mil --index index --features features

The slides are made ones whose truth tables say where each cell lies: those of `cytossl_monai.data.synthetic.slides`, or
others of the same layout (truth/<slide_id>.csv beside the slide table with x,y,w,h,class in level-0 pixels). A tile is
a lesion tile when the centre of a lesion cell lies in it (of its nucleus, where the table has it). On every positive
slide:

- AUC of the tiles' ranking against lesion tiles: 0.5 is chance;
- hits: lesion tiles among the 20 that lead, beside what 20 random tiles of the slide would hold.

Of features of cells (``instances: nuclei``), with --folds, each field counts where the centre of its nucleus lies in a
lesion cell.

Several rankings are compared in the same run: attention alone, tile score alone, and the two multiplied (what reports
rank by). The intervals are bootstrap ones over the slides. Slides on which the classifier was trained flatter it: give
others, or --folds, the output of cross-validation, where each slide is seen by the fold that was not trained on it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from cytossl_monai.data import TileIndex, read_features, read_slide_table
from cytossl_monai.inference import SlideClassifier

CONFIG = Path(__file__).resolve().parents[2] / "bundles" / "cytossl_inference" / "configs" / "inference.json"
LESIONS = ("ascus", "asch", "lsil", "hsil", "scc", "agc")
RANKINGS = {
    "attention x score": lambda tiles: tiles["attention"] * tiles["score"],
    "attention": lambda tiles: tiles["attention"],
    "tile score": lambda tiles: tiles["score"],
    "number of nuclei": lambda tiles: tiles["n_nuclei"],
}
FIELDS = {name: rank_by for name, rank_by in RANKINGS.items() if name != "number of nuclei"}


def lesion_tiles(tiles: pd.DataFrame, truth: pd.DataFrame) -> np.ndarray:
    """(N,) bool: which tiles hold the centre of a lesion cell."""
    cells = truth[truth["class"].isin(LESIONS)]
    x, y = cells["x"] + cells["w"] / 2, cells["y"] + cells["h"] / 2
    if "nucleus_x" in cells:
        with_nucleus = cells["nucleus_w"] > 0
        x = x.where(~with_nucleus, cells["nucleus_x"] + cells["nucleus_w"] / 2)
        y = y.where(~with_nucleus, cells["nucleus_y"] + cells["nucleus_h"] / 2)
    left, top = tiles["x"].to_numpy()[:, None], tiles["y"].to_numpy()[:, None]
    size = tiles["size"].to_numpy()[:, None]
    x, y = x.to_numpy()[None], y.to_numpy()[None]
    return ((x >= left) & (x < left + size) & (y >= top) & (y < top + size)).any(1)


def lesion_fields(fields: pd.DataFrame, truth: pd.DataFrame) -> np.ndarray:
    """(N,) bool: which fields are centred in the box of a lesion cell."""
    cells = truth[truth["class"].isin(LESIONS)]
    left, top = cells["x"].to_numpy()[None], cells["y"].to_numpy()[None]
    width, height = cells["w"].to_numpy()[None], cells["h"].to_numpy()[None]
    x = (fields["x"] + fields["size"] / 2).to_numpy()[:, None]
    y = (fields["y"] + fields["size"] / 2).to_numpy()[:, None]
    return ((x >= left) & (x < left + width) & (y >= top) & (y < top + height)).any(1)


def measure(tiles: pd.DataFrame, lesion: np.ndarray, top: int) -> dict[str, dict[str, float]]:
    """AUC and hits of each ranking on one slide, and the hits that random tiles would have."""
    found = {}
    for name, rank_by in (RANKINGS if "n_nuclei" in tiles else FIELDS).items():
        values = rank_by(tiles).to_numpy(np.float64)
        leading = np.argsort(-values, kind="stable")[:top]
        found[name] = {"auc": roc_auc_score(lesion, values), "hits": float(lesion[leading].sum())}
    found["random tiles"] = {"auc": 0.5, "hits": float(lesion.mean() * min(top, len(lesion)))}
    return found


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean over the slides and its bootstrap 95 % interval."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    return float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def out_of_fold(folds: Path, index_dir: Path, features_dir: Path, output: Path) -> None:
    """Tables of tiles of every slide, each by the fold that kept it out."""
    for path in sorted(folds.glob("fold_*/fold.json")):
        classifier = SlideClassifier(path.parent / "model.pt")
        for slide_id in json.loads(path.read_text())["slides"]:
            bag = read_features(features_dir / f"{slide_id}.h5")
            if bag.attrs.get("instances") == "nuclei":
                places = dict(zip(("x", "y"), bag.coords.T, strict=True))
                table = pd.DataFrame(places).assign(size=int(bag.attrs["patch_size_level0"]))
            else:
                table = TileIndex.read(index_dir / f"{slide_id}.parquet").table
            judged = classifier.predict(bag.features, bag.encoder, slide_id)
            (output / slide_id).mkdir(parents=True, exist_ok=True)
            table = table.assign(attention=judged.attention, score=judged.score)
            table.to_parquet(output / slide_id / "tiles.parquet")


def infer(slides: Path, output: Path, encoder: Path, classifier: list[Path], overrides: list[str]) -> None:
    """Run the inference bundle for the tables of tiles alone."""
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(CONFIG)]
    command += ["--slides", str(slides), "--encoder", str(encoder), "--output_dir", str(output)]
    command += ["--classifier", str([str(c) for c in classifier]) if len(classifier) > 1 else str(classifier[0])]
    status = subprocess.run([*command, "--evidence", "['tiles']", *overrides], check=False).returncode
    if status not in (0, 3):
        raise SystemExit(f"inference ended with status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=Path, required=True, help="slide table; truth/ lies beside it")
    parser.add_argument("--inference", type=Path, help="output_dir of an inference run over these slides")
    parser.add_argument("--encoder", type=Path, help="with --classifier: run inference first")
    parser.add_argument("--classifier", type=Path, nargs="+", help="one, or folds")
    parser.add_argument("--folds", type=Path, help="output_dir of cross-validation, with --index and --features")
    parser.add_argument("--index", type=Path)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--top", type=int, default=20)
    arguments, overrides = parser.parse_known_args()
    ways = [
        arguments.inference is not None,
        None not in (arguments.encoder, arguments.classifier),
        None not in (arguments.folds, arguments.index, arguments.features),
    ]
    if sum(ways) != 1:
        parser.error("give --inference, or --encoder and --classifier, or --folds, --index and --features")

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.inference or Path(temporary)
        if arguments.folds is not None:
            out_of_fold(arguments.folds, arguments.index, arguments.features, folder)
        elif arguments.inference is None:
            infer(arguments.slides, folder, arguments.encoder, arguments.classifier, overrides)
        rows, without = [], []
        for record in read_slide_table(arguments.slides):
            truth = pd.read_csv(arguments.slides.parent / "truth" / f"{record.slide_id}.csv")
            path = folder / record.slide_id / "tiles.parquet"
            if not truth["class"].isin(LESIONS).any() or not path.is_file():
                continue
            tiles = pd.read_parquet(path)
            lesion = (lesion_tiles if "n_nuclei" in tiles else lesion_fields)(tiles, truth)
            if not 0 < lesion.sum() < len(lesion):
                without.append(record.slide_id)
                continue
            for name, values in measure(tiles, lesion, arguments.top).items():
                rows.append({"slide_id": record.slide_id, "ranking": name, "lesion_tiles": lesion.sum(), **values})
    if not rows:
        raise SystemExit("no positive slide with a table of tiles and both kinds of tiles")
    table = pd.DataFrame(rows)
    first = table[table["ranking"] == "attention"]
    print(f"{len(first)} positive slides, {first['lesion_tiles'].mean():.1f} lesion tiles a slide on average")
    if without:
        print(f"left out, all or no tiles with a lesion: {', '.join(without)}")
    print(f"{'ranking':<20}{'AUC (95 % interval)':<28}hits in the top {arguments.top} (95 % interval)")
    for name in dict.fromkeys(table["ranking"]):
        part = table[table["ranking"] == name]
        auc, hits = interval(part["auc"].to_numpy()), interval(part["hits"].to_numpy())
        ranking_auc = "0.5" if name == "random tiles" else f"{auc[0]:.3f} ({auc[1]:.3f} to {auc[2]:.3f})"
        print(f"{name:<20}{ranking_auc:<28}{hits[0]:.1f} ({hits[1]:.1f} to {hits[2]:.1f})")
    best = np.minimum(first["lesion_tiles"], arguments.top).mean()
    print(f"{'perfect':<20}{'1.0':<28}{best:.1f}")


if __name__ == "__main__":
    main()
