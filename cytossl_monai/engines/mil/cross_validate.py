"""Patient-wise cross-validation: every fold trains by the bundle's own configuration, in a process of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from cytossl_monai.data.bags.items import bag_encoder, bag_items
from cytossl_monai.data.bags.seen import seen_digests
from cytossl_monai.data.bags.splits import fold_numbers, without_test
from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.engines.bundle import training_files
from cytossl_monai.engines.mil.evaluation import write_evaluation
from cytossl_monai.engines.mil.folds import FoldRun, finished, fold_stamp, run_fold
from cytossl_monai.engines.mil.marks import with_marks
from cytossl_monai.engines.mil.predict import predict_items
from cytossl_monai.engines.settings.check import check_training
from cytossl_monai.metrics.bootstrap import Interval
from cytossl_monai.metrics.classification import classification_metrics
from cytossl_monai.networks.build import network_config
from cytossl_monai.networks.files import load_classifier, save_classifier
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.mil.ensemble import MILEnsemble
from cytossl_monai.networks.open import check_made_by
from cytossl_monai.utils.errors import SettingError, TableError
from cytossl_monai.utils.files import atomic_path, require_writable, write_json
from cytossl_monai.utils.locks import folder_lock
from cytossl_monai.utils.parallel import default_workers, raise_failures, run_parallel

__all__ = ["CrossValidation", "cross_validate"]

logger = logging.getLogger(__name__)

GIVEN = ("slides", "features_dir", "target", "classes", "seed", "output_dir", "model_path", "bundle_root", "marks")
"""Settings of ``train.json`` that the runs of a cross-validation or a few-shot curve are given."""
FOLDS = ("n_folds", "fold", "test_fold", "holdout", "items", "splits")
"""Settings of ``train.json`` that choose slides, which such runs do themselves."""


@dataclass(frozen=True)
class CrossValidation:
    """What a cross-validation gives.

    Args:
        intervals: the figures of the pooled out-of-fold predictions, each with its 95 % interval.
        probabilities: (n, C) out-of-fold probability of every slide.
        labels: (n,) or (n, C).
        slides: (n,) slide_ids.
        folds: (n,) the fold that a slide was held out in.
        ensemble: path of the classifier that averages the folds.
        nested: the figures of ensembles, by nested folds; None where they were not asked for.
    """

    intervals: dict[str, Interval]
    probabilities: np.ndarray
    labels: np.ndarray
    slides: list[str]
    folds: np.ndarray
    ensemble: Path
    nested: dict[str, Interval] | None = None


def cross_validate(
    config: str | os.PathLike[str],
    slides: str | os.PathLike[str],
    features_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    target: str = "multiclass",
    classes: Sequence[str] | None = None,
    n_folds: int = 5,
    seed: int = 0,
    overlays: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    overrides: Mapping[str, Any] | None = None,
    num_workers: int | None = None,
    n_resamples: int = 2000,
    encoder: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    nested: bool = False,
    repeats: int = 1,
    marks: str | os.PathLike[str] | None = None,
) -> CrossValidation:
    """Train k classifiers, each without one fold of the patients, and judge each slide by the one that never saw it.

    Fold i is tested on, the fold after it decides when training stops, the others train: the test slides have no say in
    their classifier. Slides that the table's ``split`` keeps for a test are left out of all folds. Finished folds are
    kept and not trained again unless slides, labels, features or settings changed.

    Writes to ``output_dir``: ``fold_<i>/`` (model, log, predictions), ``predictions.csv`` (pooled, out of fold),
    ``metrics.json``, ``roc.png``, ``confusion_matrix.png``, and ``model.pt``: the folds' ensemble, for inference.

    With ``repeats``, all of it is done so many times, with seeds ``seed``, ``seed + 1`` and on: other folds (unless the
    table gives them), other weights to start from. A slide's probability is then the mean of those of its classifiers,
    one a repeat, none of which saw it. Tens of slides want it: single repeats differ, and ``repeats.csv`` says by how
    much. Further repeats write to ``repeat_<r>/``.

    These figures are those of single classifiers (of as many as there are repeats); the ensemble has seen every slide.
    With ``nested`` ensembles are measured too: for each fold (of the first repeat) the others are cross-validated by
    themselves, and the ensemble of these k - 1 classifiers (a repeat) judges the fold, which none of them has seen.
    That trains k (k - 1) classifiers more a repeat, and writes the same files to ``nested/``. The ensemble that ships
    has more members, and each of them a fold more to learn from.

    Args:
        config: the bundle's ``train.json``.
        slides: slide table with labels; its column ``fold``, if full, gives the folds.
        features_dir: folder of ``<slide_id>.h5``.
        output_dir: where to.
        target: kind of target.
        classes: names in order, or None.
        n_folds: k, where the table has no folds.
        seed: of folds and training.
        overlays: configuration files laid over ``config``; a path alone is one.
        overrides: values to set in it.
        num_workers: folds at a time; None: one a core on a CPU, 1 with CUDA; 0: all in this process.
        n_resamples: draws of the bootstrap.
        encoder: the encoder that the features must come from, see `open_encoder`; None takes any.
        weights: its weights, where it is a card.
        nested: measure ensembles by nested folds; needs four folds or more.
        repeats: how many times all of it is done, at least 1.
        marks: cells that somebody marked, see `with_marks`; those of the slides that are tested on are not looked at.

    Returns:
        figures and predictions.

    Raises:
        SettingError: for overrides or overlays that the training does not know, and for repeats below 1.
        TableError: for folds that cannot be (see ``data.bags.splits``), fewer than three.
        FeatureError: for features that cannot be used.
        CheckpointError: for features of another encoder than the one named.
        RunError: when a fold failed; the message names it, the finished ones are kept.
        LockedError: when another run writes to ``output_dir``.
    """
    if repeats < 1:
        raise SettingError(f"setting repeats must be a whole number, at least 1; it is {repeats}")
    output_dir, files = Path(output_dir), training_files(config, overlays)
    require_writable(output_dir)
    check_training(files, overrides or {}, "cytossl_mil/train", (*GIVEN, *FOLDS))
    items = with_marks(bag_items(without_test(read_slide_table(slides)), features_dir, target, classes), marks)
    made_by = bag_encoder(items)
    if encoder is not None:
        check_made_by(made_by, encoder, weights)
    data = {"target": target, "classes": items[0]["classes"], "n_folds": n_folds}
    places = {"slides": str(Path(slides).resolve()), "features_dir": str(Path(features_dir).resolve())}
    places["bundle_root"] = str(Path(config).resolve().parents[1])
    jobs, folds_of = [], []
    for repeat in range(repeats):
        own = {**data, "seed": seed + repeat}
        folds = fold_numbers(items, n_folds, seed + repeat)
        folds_of.append(folds)
        numbers = sorted(set(folds.tolist()))
        _check_number(len(numbers), nested)
        stamp = fold_stamp(files, {**dict(overrides or {}), **own}, items, folds)
        # Given as they are: no split of the table nor other folds can bring test slides into the training.
        folded = [{**item, "split": None, "fold": int(fold)} for item, fold in zip(items, folds)]
        folder = output_dir / f"repeat_{repeat}" if repeat else output_dir
        for place, number in enumerate(numbers):
            following = numbers[(place + 1) % len(numbers)]
            jobs.append(
                FoldRun(
                    number,
                    repeat,
                    files,
                    dict(overrides or {}),
                    {**own, **places, "items": folded, "fold": following, "test_fold": number},
                    str((folder / f"fold_{number}").resolve()),
                    tuple(item for item in folded if item["fold"] == number),
                    stamp,
                )
            )
    folds = folds_of[0]
    with folder_lock(output_dir, "cross-validation"):
        result = _train_and_judge(jobs, items, folds, made_by, output_dir, target, n_resamples, seed, num_workers)
        if not nested:
            return result
        inner = {
            "target": target,
            "classes": items[0]["classes"],
            "seed": seed,
            "overlays": overlays,
            "overrides": overrides,
            "num_workers": num_workers,
            "n_resamples": 1,
            "repeats": repeats,
            "marks": marks,
        }
        judged = _nested_probabilities(config, slides, features_dir, output_dir / "nested", items, folds, inner)
        figures = write_evaluation(
            output_dir / "nested",
            result.slides,
            [item["patient_id"] for item in items],
            result.labels,
            judged,
            items[0]["classes"],
            target,
            n_resamples,
            seed,
        )
        print(f"ensembles, by nested folds: AUC {figures['auc']}")
        return replace(result, nested=figures)


def _check_number(n_folds: int, nested: bool) -> None:
    if n_folds < 3:
        raise TableError(f"cross-validation needs at least 3 folds (test, validation, training), got {n_folds}")
    if nested and n_folds < 4:
        raise TableError(f"nested folds need at least 4 folds, three of them for each ensemble; got {n_folds}")


def _nested_probabilities(
    config: str | os.PathLike[str],
    slides: str | os.PathLike[str],
    features_dir: str | os.PathLike[str],
    folder: Path,
    items: Sequence[dict[str, Any]],
    folds: np.ndarray,
    settings: Mapping[str, Any],
) -> np.ndarray:
    """(n, C): each slide by the ensemble of a cross-validation of the other folds alone."""
    fold_of = {item["slide_id"]: int(fold) for item, fold in zip(items, folds)}
    records = [record for record in read_slide_table(slides) if record.slide_id in fold_of]  # without those of a test
    probabilities = np.zeros((len(items), len(items[0]["classes"])))
    for number in sorted(set(fold_of.values())):
        own = folder / f"fold_{number}"
        # A datalist: what a spreadsheet would run is kept as it is in it, and its folds are those of the outer run.
        rows = [
            {
                **record.extra,
                "slide_id": record.slide_id,
                "path": str(record.path),
                "label": record.label,
                "patient_id": record.patient_id,
                "fold": fold_of[record.slide_id],
            }
            for record in records
            if fold_of[record.slide_id] != number
        ]
        write_json(own / "slides.json", rows)
        ensemble = cross_validate(config, own / "slides.json", features_dir, own, **settings).ensemble
        held_out = [item for item, fold in zip(items, folds) if fold == number]
        probabilities[folds == number], _ = predict_items(load_classifier(ensemble), held_out)
    return probabilities


def _train_and_judge(
    jobs: Sequence[FoldRun],
    items: Sequence[dict[str, Any]],
    folds: np.ndarray,
    made_by: Mapping[str, Any],
    output_dir: Path,
    target: str,
    n_resamples: int,
    seed: int,
    num_workers: int | None,
) -> CrossValidation:
    """Train the folds that are not finished, pool what they predict, and write figures and ensemble."""
    results = {(job.repeat, job.number): finished(job) for job in jobs}
    waiting = [job for job in jobs if results[job.repeat, job.number] is None]
    if len(waiting) < len(jobs):
        logger.info("%d of %d folds are finished already", len(jobs) - len(waiting), len(jobs))
    workers = (1 if torch.cuda.is_available() else default_workers()) if num_workers is None else num_workers
    outcomes = run_parallel(run_fold, waiting, workers, title="folds")
    raise_failures([outcome for outcome in outcomes if outcome.error is not None], len(jobs), "folds")
    place_of = {item["slide_id"]: i for i, item in enumerate(items)}
    n_repeats = 1 + max(job.repeat for job in jobs)
    each = np.zeros((n_repeats, len(items), len(items[0]["classes"])))
    for job in jobs:
        result = results[job.repeat, job.number] or finished(job)
        assert result is not None, "a fold that did not fail has left its result"
        each[job.repeat, [place_of[s] for s in result["slides"]]] = result["probabilities"]
    probabilities = each.mean(axis=0)
    labels = np.array([item["label"] for item in items])
    names = [item["slide_id"] for item in items]
    intervals = write_evaluation(
        output_dir,
        names,
        [item["patient_id"] for item in items],
        labels,
        probabilities,
        items[0]["classes"],
        target,
        n_resamples,
        seed,
    )
    auc = intervals["auc"]
    members = [load_classifier(Path(job.folder) / "model.pt") for job in jobs]
    ensemble = MILClassifier(
        MILEnsemble(
            [m.network for m in members],
            target,
            [float(m.temperature) for m in members],
            [m.bias.tolist() for m in members],
        ),
        members[0].classes,
        target,
        prevalence=torch.stack([m.prevalence for m in members]).mean(dim=0).tolist(),
        encoder=made_by,
        meta={
            "out_of_fold": {name: i.as_dict() for name, i in intervals.items()},
            "n_slides": len(items),
            "seen": seen_digests(items),
            "tile_choice": list(members[0].tile_choice),
        },
    )
    logger.info("ensemble of %s", [network_config(m.network)["_target_"] for m in members[:1]])
    path = save_classifier(output_dir / "model.pt", ensemble)
    spread = _write_repeats(output_dir / "repeats.csv", each, labels, target, seed)
    done = f"{len(set(folds.tolist()))} folds{f' x {n_repeats}' if n_repeats > 1 else ''}"
    print(f"{len(items)} slides, {done}: out-of-fold AUC {auc}{spread}")
    return CrossValidation(intervals, probabilities, labels, names, folds, path)


def _write_repeats(path: Path, each: np.ndarray, labels: np.ndarray, target: str, seed: int) -> str:
    """Write the figures of every repeat, (R, n, C) probabilities, one a line; their least and largest AUC in words."""
    if len(each) == 1:
        path.unlink(missing_ok=True)  # of a run with more
        return ""
    figures = [classification_metrics(labels, probabilities, target) for probabilities in each]
    table = pd.DataFrame([{"seed": seed + r, **row} for r, row in enumerate(figures)])
    with atomic_path(path) as partial:
        table.to_csv(partial, index_label="repeat", float_format="%.6f")
    return f"; single repeats {table['auc'].min():.3f} to {table['auc'].max():.3f}"
