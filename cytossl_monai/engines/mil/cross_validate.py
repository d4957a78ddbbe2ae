"""Patient-wise cross-validation: every fold trains by the bundle's own configuration, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cytossl_monai.data.bags.items import bag_encoder, bag_items
from cytossl_monai.data.bags.splits import fold_numbers
from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.engines.bundle import run_training, training_files
from cytossl_monai.engines.mil.evaluation import write_evaluation
from cytossl_monai.engines.mil.predict import predict_items
from cytossl_monai.engines.settings.check import check_training
from cytossl_monai.metrics.bootstrap import Interval
from cytossl_monai.networks.build import network_config
from cytossl_monai.networks.files import load_classifier, save_classifier
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.mil.ensemble import MILEnsemble
from cytossl_monai.networks.open import check_made_by
from cytossl_monai.utils.errors import CheckpointError, InputError, RunError, TableError, plain_cause
from cytossl_monai.utils.files import file_fingerprint, require_writable, sha256_file, write_json
from cytossl_monai.utils.locks import folder_lock
from cytossl_monai.utils.parallel import default_workers, run_parallel

__all__ = ["CrossValidation", "cross_validate"]

logger = logging.getLogger(__name__)

GIVEN = ("slides", "features_dir", "target", "classes", "seed", "output_dir", "model_path", "bundle_root")
"""Settings of ``train.json`` that the runs of a cross-validation or a few-shot curve are given."""
_FOLDS = ("n_folds", "fold", "test_fold")


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


@dataclass(frozen=True)
class _Fold:
    number: int
    files: tuple[str, ...]
    overrides: dict[str, Any]
    data: dict[str, Any]
    folder: str
    held_out: tuple[dict[str, Any], ...]
    stamp: str


def _run_fold(fold: _Fold) -> int:
    folder = Path(fold.folder)
    model = folder / "model.pt"
    (folder / "fold.json").unlink(missing_ok=True)  # what it tells is no longer that of the model
    try:
        run_training(fold.files, fold.overrides, {**fold.data, "output_dir": str(folder), "model_path": str(model)})
    except Exception as error:  # noqa: BLE001 - raised again, unwrapped
        raise plain_cause(error) from None  # MONAI wraps it, and a process hands on the outermost alone
    classifier = load_classifier(model)
    probabilities, logits = predict_items(classifier, fold.held_out)
    # Written last: a fold with this file is whole.
    write_json(
        folder / "fold.json",
        {
            "stamp": fold.stamp,
            "model": sha256_file(model),
            "fold": fold.number,
            "slides": [item["slide_id"] for item in fold.held_out],
            "probabilities": probabilities.astype(float).tolist(),
            "logits": logits.double().tolist(),
            "temperature": float(classifier.temperature),
            "bias": classifier.bias.tolist(),
            "validation": classifier.meta.get("validation"),
        },
    )
    return fold.number


def _finished(fold: _Fold) -> dict[str, Any] | None:
    """What a fold left, when it was finished with the same data and settings; None otherwise."""
    path, model = Path(fold.folder) / "fold.json", Path(fold.folder) / "model.pt"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        load_classifier(model)
        if content["stamp"] != fold.stamp:
            return None
        if content["model"] != sha256_file(model):
            raise CheckpointError(f"{model} is not the model that {path} tells of")
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("fold %d is done again: %s", fold.number, error)
        return None
    return dict(content)


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
) -> CrossValidation:
    """Train k classifiers, each without one fold of the patients, and judge each slide by the one that never saw it.

    Fold i is tested on, the fold after it decides when training stops, the others train: the test slides have no say in
    their classifier. Finished folds are kept and not trained again unless slides, labels, features or settings changed.

    Writes to ``output_dir``: ``fold_<i>/`` (model, log, predictions), ``predictions.csv`` (pooled, out of fold),
    ``metrics.json``, ``roc.png``, ``confusion_matrix.png``, and ``model.pt``: the folds' ensemble, for inference.

    These figures are those of single classifiers; the ensemble has seen every slide. With ``nested`` ensembles are
    measured too: for each fold the others are cross-validated by themselves, and the ensemble of these k - 1
    classifiers judges the fold, which none of them has seen. That trains k (k - 1) classifiers more, and writes the
    same files to ``nested/``. The ensemble that ships has one member more, and each of them a fold more to learn from.

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

    Returns:
        figures and predictions.

    Raises:
        SettingError: for overrides or overlays that the training does not know.
        TableError: for folds that cannot be (see ``data.bags.splits``), fewer than three.
        FeatureError: for features that cannot be used.
        CheckpointError: for features of another encoder than the one named.
        RunError: when a fold failed; the message names it, the finished ones are kept.
        LockedError: when another run writes to ``output_dir``.
    """
    output_dir, files = Path(output_dir), training_files(config, overlays)
    require_writable(output_dir)
    check_training(files, overrides or {}, "cytossl_mil/train", (*GIVEN, *_FOLDS))
    items = bag_items(slides, features_dir, target, classes)
    made_by = bag_encoder(items)
    if encoder is not None:
        check_made_by(made_by, encoder, weights)
    folds = fold_numbers(items, n_folds, seed)
    numbers = sorted(set(folds.tolist()))
    if len(numbers) < 3:
        raise TableError(f"cross-validation needs at least 3 folds (test, validation, training), got {len(numbers)}")
    if nested and len(numbers) < 4:
        raise TableError(f"nested folds need at least 4 folds, three of them for each ensemble; got {len(numbers)}")
    settings = dict(overrides or {})
    data = {"target": target, "classes": items[0]["classes"], "n_folds": n_folds, "seed": seed}
    stamp = _stamp(files, {**settings, **data}, items, folds)
    data |= {"slides": str(Path(slides).resolve()), "features_dir": str(Path(features_dir).resolve())}
    data["bundle_root"] = str(Path(config).resolve().parents[1])
    jobs = []
    for place, number in enumerate(numbers):
        following = numbers[(place + 1) % len(numbers)]
        held_out = tuple(item for item, fold in zip(items, folds) if fold == number)
        jobs.append(
            _Fold(
                number,
                files,
                settings,
                {**data, "fold": following, "test_fold": number},
                str((output_dir / f"fold_{number}").resolve()),
                held_out,
                stamp,
            )
        )
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
    records = [record for record in read_slide_table(slides) if record.slide_id in fold_of]
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
    jobs: Sequence[_Fold],
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
    done = {job.number: _finished(job) for job in jobs}
    waiting = [job for job in jobs if done[job.number] is None]
    if len(waiting) < len(jobs):
        logger.info("%d of %d folds are finished already", len(jobs) - len(waiting), len(jobs))
    workers = (1 if torch.cuda.is_available() else default_workers()) if num_workers is None else num_workers
    failures = [
        outcome for outcome in run_parallel(_run_fold, waiting, workers, title="folds") if outcome.error is not None
    ]
    if failures:
        inputs = [f.error for f in failures if isinstance(f.error, InputError)]
        if len(inputs) == len(jobs):  # the same input fails them all
            raise inputs[0]
        reasons = "; ".join(f"fold {f.item.number}: {f.error}" for f in failures)
        raise RunError(
            f"{len(failures)} of {len(jobs)} folds failed ({reasons}); the others are kept, start again to do those "
            "alone"
        )
    results = [_finished(job) for job in jobs]
    place_of = {item["slide_id"]: i for i, item in enumerate(items)}
    probabilities = np.zeros((len(items), len(items[0]["classes"])))
    for result in results:
        assert result is not None, "a fold that did not fail has left its result"
        probabilities[[place_of[s] for s in result["slides"]]] = result["probabilities"]
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
        encoder=made_by,
        meta={"out_of_fold": {name: i.as_dict() for name, i in intervals.items()}, "n_slides": len(items)},
    )
    logger.info("ensemble of %s", [network_config(m.network)["_target_"] for m in members[:1]])
    path = save_classifier(output_dir / "model.pt", ensemble)
    print(f"{len(items)} slides, {len(jobs)} folds: out-of-fold AUC {auc}")
    return CrossValidation(intervals, probabilities, labels, names, folds, path)


def _stamp(
    files: Sequence[str], settings: Mapping[str, Any], items: Sequence[dict[str, Any]], folds: np.ndarray
) -> str:
    """Digest of all that a fold's result depends on."""
    content = {
        "files": [file_fingerprint(path) for path in files],
        "settings": dict(settings),
        "items": [
            [i["slide_id"], i["patient_id"], np.asarray(i["label"]).tolist(), file_fingerprint(i["features"]), int(f)]
            for i, f in zip(items, folds)
        ],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
