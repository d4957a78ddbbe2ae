"""The ensemble that ships, measured by nested folds, against a naive loop."""

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

from cytossl_monai.data import bag_items, read_features, split_items
from cytossl_monai.engines.mil import cross_validate as module
from cytossl_monai.networks.files import save_classifier
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.utils.errors import TableError

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
    result = module.cross_validate(*arguments, **settings, nested=True)
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
    module.cross_validate(*arguments, **settings, nested=True)
    assert [path.stat().st_mtime_ns for path in models] == before
    assert module.cross_validate(*arguments, **settings).nested is None
    with pytest.raises(TableError, match="nested folds need at least 4 folds"):
        module.cross_validate(*arguments, **{**settings, "n_folds": 3}, nested=True)
