"""Class names that matplotlib would take for formulas, and places that QuPath counts from the scanned part."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cytossl_monai.visualize.curves_mil import plot_confusion_matrix, plot_few_shot, plot_roc
from cytossl_monai.visualize.geojson import feature_collection

NAMES = [("$x^{", "_hidden"), ("a$b", "$\\bad$"), ("^_^", "x" * 500), ("%", "{}"), ("line\nbreak", "#")]


@pytest.mark.parametrize("names", NAMES)
def test_names_of_any_kind_are_drawn(tmp_path: Path, names: tuple[str, str]) -> None:
    labels, probabilities = np.array([0, 1, 0, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    curve = pd.DataFrame({"shots": [1, 2], "mean": [0.5, 0.6], "low": [0.4, 0.5], "high": [0.6, 0.7]})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*legend.*|.*label.*")
        assert plot_roc(tmp_path / "roc.png", labels, probabilities, list(names)) is not None
        plot_confusion_matrix(tmp_path / "matrix.png", labels, labels, list(names))
        plot_few_shot(tmp_path / "shots.png", dict.fromkeys(names, curve))


def test_places_for_qupath_count_from_the_scanned_part() -> None:
    coords = np.array([[1000, 2000], [1448, 2000]])
    shown = np.array([0.2, 0.9])
    usual = feature_collection("s", coords, 448, shown, {}, np.array([1]))
    moved = feature_collection("s", coords, 448, shown, {}, np.array([1]), bounds_offset=(300, 700))
    for one, other in zip(usual["features"], moved["features"], strict=True):
        difference = np.array(one["geometry"]["coordinates"]) - np.array(other["geometry"]["coordinates"])
        assert (difference.reshape(-1, 2) == (300, 700)).all()
