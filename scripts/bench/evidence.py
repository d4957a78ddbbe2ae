"""Measure whether the evidence of slide inference finds the lesion cells.

    python scripts/bench/evidence.py --slides slides/slides.csv --inference inference_dir
    python scripts/bench/evidence.py --slides slides/slides.csv --encoder model.pt --classifier classifier.pt
    python scripts/bench/evidence.py --slides slides/slides.csv --folds mil --index index --features features
    python scripts/bench/evidence.py --slides slides/slides.csv --supervised --index index --features features

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
others, or --folds, the output of cross-validation, where each slide is seen by the folds (one a repeat) that were not
trained on it, and their attention and scores are averaged.

--supervised asks what the features could tell: a logistic regression learns from the truth tables themselves which
tiles or cells of the training slides are lesions, and ranks those of the slides that it has not seen (five folds by
patient, standardised features, class weights, the penalty chosen on inner folds by patient). Its slide score is the
mean of the 20 highest scores. Composed slides show one crop of a cell several times; where the truth tables name it
(column file), a second row leaves out of each training set the crops that it is judged on as well.
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
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cytossl_monai.data import TileIndex, assign_folds, read_features, read_slide_table
from cytossl_monai.data.bags.features import Features
from cytossl_monai.inference import SlideClassifier
from cytossl_monai.metrics import bootstrap_intervals, linear_probe

CONFIG = Path(__file__).resolve().parents[2] / "bundles" / "cytossl_inference" / "configs" / "inference.json"
RESAMPLES = 2000
"""Draws of the bootstrap."""
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


def crops_of(fields: pd.DataFrame, truth: pd.DataFrame) -> list[str]:
    """(N,) crop in whose box each field is centred: a lesion's before another's, then the nearest; "" outside all."""
    if truth.empty:  # a slide of glass and debris
        return [""] * len(fields)
    x = (fields["x"] + fields["size"] / 2).to_numpy()[:, None] - truth["x"].to_numpy()[None]
    y = (fields["y"] + fields["size"] / 2).to_numpy()[:, None] - truth["y"].to_numpy()[None]
    width, height = truth["w"].to_numpy()[None], truth["h"].to_numpy()[None]
    distance = np.hypot(x - width / 2, y - height / 2) + 1e6 * ~truth["class"].isin(LESIONS).to_numpy()[None]
    distance[(x < 0) | (x >= width) | (y < 0) | (y >= height)] = np.inf
    names = (truth["class"] + "/" + truth["file"].astype(str)).to_numpy()
    return np.where(np.isfinite(distance).any(1), names[distance.argmin(1)], "").tolist()


def measure(tiles: pd.DataFrame, lesion: np.ndarray, top: int) -> dict[str, dict[str, float]]:
    """AUC and hits of each ranking on one slide, and the hits that random tiles would have."""
    ranking = {}
    for name, rank_by in (RANKINGS if "n_nuclei" in tiles else FIELDS).items():
        values = rank_by(tiles).to_numpy(np.float64)
        leading = np.argsort(-values, kind="stable")[:top]
        ranking[name] = {"auc": roc_auc_score(lesion, values), "hits": float(lesion[leading].sum())}
    ranking["random tiles"] = {"auc": 0.5, "hits": float(lesion.mean() * min(top, len(lesion)))}
    return ranking


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean over the slides and its bootstrap 95 % interval."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    return float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def places_of(bag: Features, index_dir: Path, slide_id: str) -> pd.DataFrame:
    """Places of a slide's features: x, y, size of each field around a nucleus, or the table of its tiles."""
    if bag.attrs.get("instances") == "nuclei":
        places = dict(zip(("x", "y"), bag.coords.T, strict=True))
        return pd.DataFrame(places).assign(size=int(bag.attrs["patch_size_level0"]))
    return TileIndex.read(index_dir / f"{slide_id}.parquet").table


def out_of_fold(folds: Path, index_dir: Path, features_dir: Path, output: Path) -> None:
    """Tables of tiles of every slide, each by the folds that kept it out: the mean of as many as there are repeats."""
    judges: dict[str, list[SlideClassifier]] = {}
    for path in sorted([*folds.glob("fold_*/fold.json"), *folds.glob("repeat_*/fold_*/fold.json")]):
        classifier = SlideClassifier(path.parent / "model.pt")
        for slide_id in json.loads(path.read_text())["slides"]:
            judges.setdefault(slide_id, []).append(classifier)
    for slide_id, classifiers in judges.items():
        bag = read_features(features_dir / f"{slide_id}.h5")
        table = places_of(bag, index_dir, slide_id)
        judged = [classifier.predict(bag.features, bag.encoder, slide_id) for classifier in classifiers]
        means = {name: np.mean([getattr(j, name) for j in judged], axis=0) for name in ("attention", "score")}
        (output / slide_id).mkdir(parents=True, exist_ok=True)
        table.assign(**means).to_parquet(output / slide_id / "tiles.parquet")


def without_held_crops(
    features: np.ndarray, lesion: np.ndarray, folds: np.ndarray, crops: np.ndarray, penalties: dict[int, float]
) -> np.ndarray:
    """(N,) scores of models that saw neither the slide of a cell nor its crop, wherever else that crop was laid."""
    rng = np.random.default_rng(0)
    names, number = np.unique(crops, return_inverse=True)
    part = rng.integers(5, size=len(names))[number]
    part[crops == ""] = rng.integers(5, size=(crops == "").sum())  # nuclei outside of all cells belong to no crop
    scores = np.zeros(len(lesion))
    for fold in np.unique(folds):
        for held in range(5):
            seen, judged = (folds != fold) & (part != held), (folds == fold) & (part == held)
            regression = LogisticRegression(C=penalties[fold], class_weight="balanced", max_iter=200)
            model = make_pipeline(StandardScaler(), regression).fit(features[seen], lesion[seen])
            if judged.any():
                scores[judged] = model.predict_proba(features[judged])[:, 1]
    return scores


def supervised(slides: Path, index_dir: Path, features_dir: Path, top: int) -> None:
    """Print how well a logistic regression ranks cells and slides when it is told which cells are lesions."""
    bags, lesions, crops, patients = [], [], [], []
    for record in read_slide_table(slides):
        bag = read_features(features_dir / f"{record.slide_id}.h5")
        truth = pd.read_csv(slides.parent / "truth" / f"{record.slide_id}.csv")
        places = places_of(bag, index_dir, record.slide_id)
        cells = "n_nuclei" not in places
        bags.append(np.asarray(bag.features, np.float64))
        lesions.append((lesion_fields if cells else lesion_tiles)(places, truth))
        crops.append(crops_of(places, truth) if cells and "file" in truth else [])
        patients.append(record.patient_id)
    positive = np.array([lesion.any() for lesion in lesions])
    slide_folds = assign_folds(positive, patients, 5)
    slide = np.repeat(np.arange(len(bags)), [len(bag) for bag in bags])
    features, lesion, folds = np.concatenate(bags), np.concatenate(lesions), slide_folds[slide]
    probed = linear_probe(features, lesion.astype(int), folds, np.array(patients)[slide])
    rows = {"other slides": probed.scores[:, 1]}
    if all(crops):
        penalties = dict(zip(np.unique(folds).tolist(), probed.penalties, strict=True))
        rows["other slides, other crops"] = without_held_crops(
            features, lesion, folds, np.concatenate(crops), penalties
        )
    print(f"{len(bags)} slides, {positive.sum()} positive; {lesion.sum()} of {len(lesion)} instances are lesions")
    print(f"C of each fold: {', '.join(f'{penalty:g}' for penalty in probed.penalties)}")
    print(f"{'trained on':<28}{'AUC in positive slides':<28}{f'hits in the top {top}':<24}slide AUC (95 % intervals)")
    for name, scores in rows.items():
        of_slide = [scores[slide == number] for number in range(len(bags))]
        ranked = [(s, truth) for s, truth in zip(of_slide, lesions, strict=True) if 0 < truth.sum() < len(truth)]
        within = interval(np.array([roc_auc_score(truth, s) for s, truth in ranked]))
        hits = interval(np.array([truth[np.argsort(-s, kind="stable")[:top]].sum() for s, truth in ranked], float))
        means = np.array([np.sort(s)[-top:].mean() for s in of_slide])
        of_slides = bootstrap_intervals(
            lambda drawn, means=means: {"auc": roc_auc_score(positive[drawn], means[drawn])},
            len(bags),
            patients,
            positive,
            RESAMPLES,
        )["auc"]
        cells_auc = f"{within[0]:.3f} ({within[1]:.3f} to {within[2]:.3f})"
        print(f"{name:<28}{cells_auc:<28}{f'{hits[0]:.1f} ({hits[1]:.1f} to {hits[2]:.1f})':<24}{of_slides}")


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
    parser.add_argument("--supervised", action="store_true", help="learn from the truth, with --index and --features")
    parser.add_argument("--index", type=Path)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--top", type=int, default=20)
    arguments, overrides = parser.parse_known_args()
    ways = [
        arguments.inference is not None,
        None not in (arguments.encoder, arguments.classifier),
        None not in (arguments.folds, arguments.index, arguments.features),
        arguments.supervised and None not in (arguments.index, arguments.features),
    ]
    if sum(ways) != 1:
        parser.error(
            "give --inference, --encoder and --classifier, or --index and --features with --folds or --supervised"
        )
    if arguments.supervised:
        supervised(arguments.slides, arguments.index, arguments.features, arguments.top)
        return

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
