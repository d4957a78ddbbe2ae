"""How many labelled slides are enough: a curve of test AUC over the number of training slides per class."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cytossl_monai.data.bags.items import bag_items
from cytossl_monai.data.bags.splits import assign_folds, without_test
from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.engines.bundle import run_training, training_files
from cytossl_monai.engines.mil.cross_validate import FOLDS, GIVEN
from cytossl_monai.engines.mil.predict import predict_items
from cytossl_monai.engines.settings.check import check_training
from cytossl_monai.metrics.classification import classification_metrics
from cytossl_monai.networks.files import load_classifier
from cytossl_monai.utils.errors import InputError, TableError, reason
from cytossl_monai.utils.files import atomic_path, file_fingerprint, require_writable
from cytossl_monai.utils.locks import folder_lock
from cytossl_monai.utils.parallel import default_workers, raise_failures, run_parallel
from cytossl_monai.utils.program import plain_cause
from cytossl_monai.visualize.curves_mil import plot_few_shot

__all__ = ["draw_shots", "few_shot_curve"]

TEST_FOLDS = 3


def draw_shots(labels: np.ndarray, patients: Sequence[str], shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``shots`` slides of every class to train on, and patients to test on.

    A third of the patients (stratified) is for testing; the training slides come from the others, from as many
    different patients as possible. The same seed gives the same test slides, and nested training slides, for every k.

    Args:
        labels: (n,) classes.
        patients: (n,) whose slide it is.
        shots: slides a class, k.
        seed: of the draw.

    Returns:
        numbers of the training slides and of the test slides.

    Raises:
        TableError: when a class has fewer than k slides outside the test patients.
    """
    test = assign_folds(labels, patients, TEST_FOLDS, seed) == 0
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for c in np.unique(labels):
        pool = rng.permutation(np.flatnonzero((labels == c) & ~test))
        if len(pool) < shots:
            raise TableError(
                f"class {c} has {len(pool)} slides beside the test patients, {shots} were asked for; ask for fewer"
            )
        seen: dict[str, int] = {}
        turns = []
        for slide in pool:
            turns.append(seen.get(patients[slide], 0))
            seen[patients[slide]] = turns[-1] + 1
        chosen += pool[np.argsort(turns, kind="stable")][:shots].tolist()
    return np.array(chosen), np.flatnonzero(test)


@dataclass(frozen=True)
class _Shot:
    shots: int
    repeat: int
    files: tuple[str, ...]
    seed: int
    overrides: dict[str, Any]
    data: dict[str, Any]
    train: tuple[dict[str, Any], ...]
    test: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        return f"k = {self.shots}, repeat {self.repeat}"


def _run_shot(job: _Shot) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model.pt")
        # So few slides leave none to validate on: training runs its course, the epoch of lowest loss is kept.
        splits = {"train": list(job.train), "val": list(job.train), "test": []}
        fixed = {"output_dir": folder, "model_path": model, "splits": splits, "patience": None, "calibrate": False}
        try:
            run_training(job.files, job.overrides, {**job.data, **fixed, "seed": job.seed})
        except Exception as error:  # noqa: BLE001 - raised again, unwrapped
            raise plain_cause(error) from None  # MONAI wraps it, and a process hands on the outermost alone
        probabilities, _ = predict_items(load_classifier(model), job.test)
    labels = np.array([item["label"] for item in job.test])
    return classification_metrics(labels, probabilities, job.data["target"])


def few_shot_curve(
    config: str | os.PathLike[str],
    slides: str | os.PathLike[str],
    features_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    shots: Sequence[int] = (1, 2, 4, 8),
    repeats: int = 10,
    target: str = "multiclass",
    classes: Sequence[str] | None = None,
    seed: int = 0,
    overlays: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    overrides: Mapping[str, Any] | None = None,
    num_workers: int | None = None,
) -> pd.DataFrame:
    """Train on k slides a class, again and again, and test on other patients.

    Slides that the table's ``split`` keeps for a test are left out.

    Writes ``few_shot_runs.csv`` (one row a run; runs found there are not repeated), ``few_shot.csv`` (one row a k:
    mean, 2.5th and 97.5th percentile over the repeats) and ``few_shot.png``.

    Args:
        config: the bundle's ``train.json``.
        slides: slide table with labels.
        features_dir: folder of ``<slide_id>.h5``.
        output_dir: where to.
        shots: the k.
        repeats: draws a k.
        target: "multiclass" or "ordinal".
        classes: names in order, or None.
        seed: of the draws and of training: repeat r draws and trains with ``seed + r``.
        overlays: configuration files laid over ``config``; a path alone is one.
        overrides: values to set in it.
        num_workers: runs at a time; None: one a core on a CPU, 1 with CUDA; 0: all in this process.

    Returns:
        the table of ``few_shot.csv``: ``shots, metric, mean, low, high, repeats``.

    Raises:
        SettingError: for overrides or overlays that the training does not know.
        TableError: when a class has too few slides for the largest k.
        InputError: for a ``multilabel`` target, where "k slides a class" has no meaning.
        RunError: when a training failed; the others are kept.
        LockedError: when another run writes to ``output_dir``.
    """
    if target == "multilabel":
        raise InputError("few-shot draws k slides of each class; a multilabel target has no classes in that sense")
    folder, files = Path(output_dir), training_files(config, overlays)
    require_writable(folder)
    check_training(files, overrides or {}, "cytossl_mil/train", (*GIVEN, *FOLDS, "patience", "calibrate"))
    items = bag_items(without_test(read_slide_table(slides)), features_dir, target, classes)
    labels = np.array([item["label"] for item in items])
    patients = [item["patient_id"] for item in items]
    settings = dict(overrides or {})
    data = {"slides": str(Path(slides).resolve()), "features_dir": str(Path(features_dir).resolve()), "target": target}
    data |= {"classes": items[0]["classes"], "bundle_root": str(Path(config).resolve().parents[1])}
    fingerprints = [file_fingerprint(path) for path in (*files, *(item["features"] for item in items))]
    made_from = [fingerprints, settings, target, items[0]["classes"], seed, labels.tolist(), patients]
    stamp = hashlib.sha256(json.dumps(made_from, default=str).encode()).hexdigest()[:16]
    jobs = []
    for k in sorted(set(shots)):
        for repeat in range(repeats):
            train, test = draw_shots(labels, patients, k, seed + repeat)
            picked = (tuple(items[i] for i in train), tuple(items[i] for i in test))
            jobs.append(_Shot(k, repeat, files, seed + repeat, settings, data, *picked))
    with folder_lock(folder, "few-shot curve"):
        return _curve(folder, jobs, stamp, num_workers)


def _known_runs(path: Path, stamp: str) -> list[dict[str, Any]]:
    """The runs that a file tells of, made with the same data and settings.

    Raises:
        TableError: when the file is no table of runs; it is not overwritten.
    """
    if not path.is_file():
        return []
    try:
        known = pd.read_csv(path)
        if absent := {"stamp", "shots", "repeat", "auc"} - set(known.columns):
            raise ValueError(f"without {', '.join(sorted(absent))}")
        rows: list[Any] = known[known["stamp"] == stamp].to_dict("records")
        return rows
    except (ValueError, OSError) as error:
        raise TableError(
            f"{path} is no table of runs ({reason(error)}); delete it, or give another output folder"
        ) from error


def _curve(folder: Path, jobs: Sequence[_Shot], stamp: str, num_workers: int | None) -> pd.DataFrame:
    """Do the runs that are not done yet, then table and picture of them all."""
    path = folder / "few_shot_runs.csv"
    rows = _known_runs(path, stamp)
    done = {(row["shots"], row["repeat"]) for row in rows}
    waiting = [job for job in jobs if (job.shots, job.repeat) not in done]
    workers = (1 if torch.cuda.is_available() else default_workers()) if num_workers is None else num_workers
    failures = []
    for outcome in run_parallel(_run_shot, waiting, workers, title="few-shot"):
        job, figures = outcome.item, outcome.result
        if outcome.error is not None or figures is None:
            failures.append(outcome)
            continue
        rows.append({"stamp": stamp, "shots": job.shots, "repeat": job.repeat} | figures)
        with atomic_path(path) as partial:
            pd.DataFrame(rows).to_csv(partial, index=False)
    raise_failures(failures, len(jobs), "trainings")
    runs = pd.DataFrame(rows)
    asked = {(job.shots, job.repeat) for job in jobs}
    runs = runs[[pair in asked for pair in zip(runs["shots"], runs["repeat"])]]
    table = []
    for metric in [c for c in runs.columns if c not in ("stamp", "shots", "repeat")]:
        for number, values in runs.groupby("shots")[metric]:
            low, high = np.nanpercentile(values, [2.5, 97.5])
            mean = float(np.nanmean(values))
            table.append(
                {"shots": number, "metric": metric, "mean": mean, "low": low, "high": high, "repeats": len(values)}
            )
    result = pd.DataFrame(table)
    with atomic_path(folder / "few_shot.csv") as partial:
        result.to_csv(partial, index=False, float_format="%.4f")
    plot_few_shot(folder / "few_shot.png", {"": result[result["metric"] == "auc"]})
    return result
