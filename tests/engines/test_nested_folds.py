"""The ensemble that ships, measured by nested folds, and repeated folds, each against a naive loop."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mil_toy import make_cohort
from sklearn.metrics import roc_auc_score

from cytossl_monai.data import bag_items, read_features, split_items
from cytossl_monai.engines.mil import folds as module
from cytossl_monai.engines.mil.cross_validate import cross_validate
from cytossl_monai.networks.files import load_classifier, save_classifier
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.utils.errors import SettingError, TableError

CLASSES = ["negative", "positive"]


def classifier_of(training: set[str]) -> MILClassifier:
    """A classifier that is another one for every set of training slides."""
    torch.manual_seed(sum(7 ** int(name[1:]) for name in training) % (2**31))
    return MILClassifier(ABMIL(12, 2, embed_dim=8), CLASSES, temperature=1.5, encoder={"hash": "abc", "dim": 12})


def fake_training(files: Sequence[str], overrides: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """In place of a training of seconds: reads the table and splits it as the bundle does."""
    items = bag_items(data["slides"], data["features_dir"])
    train = split_items(items, data["n_folds"], data["fold"], data["test_fold"], data["seed"])["train"]
    save_classifier(data["model_path"], classifier_of({item["slide_id"] for item in train}))


def test_ensembles_by_nested_folds(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("ignite").setLevel(logging.WARNING)
    monkeypatch.setattr(module, "run_training", fake_training)
    table, config = make_cohort(tmp_path, n=20), repo_root / "bundles/cytossl_mil/configs/train.json"
    arguments = (config, table, tmp_path / "features", tmp_path / "out")
    settings = {"n_folds": 4, "num_workers": 0, "n_resamples": 20}
    result = cross_validate(*arguments, **settings, nested=True)
    told = pd.read_csv(tmp_path / "out" / "nested" / "predictions.csv").set_index("slide_id")
    assert result.nested is not None
    assert result.nested.keys() == result.intervals.keys()

    # The naive loop: of the three other folds each is left out once, the next one stops the training, the last one
    # trains; the three classifiers' probabilities are averaged.
    fold_of = dict(zip(result.slides, result.folds.tolist()))
    for outer in range(4):
        rest = [fold for fold in range(4) if fold != outer]
        members = []
        for place, test in enumerate(rest):
            stop = rest[(place + 1) % 3]
            members.append(classifier_of({s for s, f in fold_of.items() if f not in (outer, test, stop)}).eval())
        for slide in (s for s, f in fold_of.items() if f == outer):
            bag = torch.as_tensor(read_features(tmp_path / "features" / f"{slide}.h5").features)[None]
            with torch.no_grad():
                each = [(m.network(bag).logits / 1.5).softmax(-1)[0, 1] for m in members]
            assert told.loc[slide, "prob_positive"] == pytest.approx(float(np.mean(each)), abs=1e-5)
    assert not np.allclose(told.loc[result.slides, "prob_positive"], result.probabilities[:, 1], atol=1e-3)

    # Finished folds are kept.
    models = sorted((tmp_path / "out").glob("nested/fold_*/fold_*/model.pt"))
    assert len(models) == 12
    before = [path.stat().st_mtime_ns for path in models]
    cross_validate(*arguments, **settings, nested=True)
    assert [path.stat().st_mtime_ns for path in models] == before
    assert cross_validate(*arguments, **settings).nested is None
    with pytest.raises(TableError, match="nested folds need at least 4 folds"):
        cross_validate(*arguments, **{**settings, "n_folds": 3}, nested=True)


def test_repeats_average_classifiers_that_never_saw_the_slide(
    tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("ignite").setLevel(logging.WARNING)
    monkeypatch.setattr(module, "run_training", fake_training)
    table, config = make_cohort(tmp_path, n=20), repo_root / "bundles/cytossl_mil/configs/train.json"
    features, settings = tmp_path / "features", {"n_folds": 3, "num_workers": 0, "n_resamples": 20}
    single = [cross_validate(config, table, features, tmp_path / f"{s}", **settings, seed=s) for s in (5, 6, 7)]
    assert not np.array_equal(single[0].folds, single[1].folds)
    assert not (tmp_path / "5" / "repeats.csv").exists()
    out = tmp_path / "out"
    result = cross_validate(config, table, features, out, **settings, seed=5, repeats=3)
    np.testing.assert_allclose(result.probabilities, np.mean([one.probabilities for one in single], 0), atol=1e-12)

    figures = pd.read_csv(out / "repeats.csv")
    aucs = [roc_auc_score(one.labels, one.probabilities[:, 1]) for one in single]
    assert figures["seed"].tolist() == [5, 6, 7]
    np.testing.assert_allclose(figures["auc"], aucs, atol=1e-6)
    told = f"20 slides, 3 folds x 3: out-of-fold AUC {result.intervals['auc']}; single repeats {min(aucs):.3f} to"
    assert told in capsys.readouterr().out

    # All of them ship: the mean of nine classifiers' probabilities.
    bag = torch.as_tensor(read_features(features / f"{result.slides[0]}.h5").features)[None]
    members = [load_classifier(path) for path in sorted(out.rglob("fold_*/model.pt"))]
    assert len(members) == 9
    with torch.no_grad():
        each = [(m.network(bag).logits / m.temperature).softmax(-1)[0, 1] for m in members]
        whole = load_classifier(result.ensemble).network(bag).logits.softmax(-1)[0, 1]
    assert float(whole) == pytest.approx(float(np.mean(each)), abs=1e-5)

    # Repeats are added to what is there, and one that is lost is made again.
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("fold_*/model.pt")}
    (out / "repeat_2" / "fold_1" / "fold.json").unlink()
    cross_validate(config, table, features, out, **settings, seed=5, repeats=4)
    changed = {path for path, time in kept.items() if path.stat().st_mtime_ns != time}
    assert changed == {out / "repeat_2" / "fold_1" / "model.pt"}
    assert len(list(out.rglob("fold_*/model.pt"))) == 12
    # Without them it is as if they had never been.
    assert np.array_equal(
        cross_validate(config, table, features, out, **settings, seed=5).probabilities, single[0].probabilities
    )
    assert not (out / "repeats.csv").exists()
    with pytest.raises(SettingError, match="repeats must be a whole number, at least 1; it is 0"):
        cross_validate(config, table, features, out, **settings, repeats=0)
