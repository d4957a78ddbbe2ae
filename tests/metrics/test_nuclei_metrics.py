"""Dice, object F1 and recall of marks, against scikit-learn, plain loops and figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import f1_score, jaccard_score

from cytossl_monai.metrics.nuclei import ObjectScore, label_overlaps, mask_dice, object_f1, point_recall


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.6, 1.0]), st.sampled_from([0.0, 0.3, 1.0]))
def test_dice_is_the_f1_of_pixels(seed: int, p: float, q: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random((9, 7)) < p, rng.random((9, 7)) < q
    expected = f1_score(b.ravel(), a.ravel(), zero_division=1.0)
    assert mask_dice(a, b) == pytest.approx(expected)
    assert mask_dice(b.astype(np.uint8) * 255, a.astype(float)) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 4), st.integers(0, 5))
def test_overlaps_and_matching_by_plain_loops(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, n + 1, (8, 8)), rng.integers(0, m + 1, (8, 8))
    overlaps = label_overlaps(a, b)
    names_a, names_b = np.unique(a[a > 0]), np.unique(b[b > 0])
    assert overlaps.shape == (len(names_a), len(names_b))
    for i, k in enumerate(names_a):
        for j, l in enumerate(names_b):
            assert overlaps[i, j] == pytest.approx(jaccard_score((b == l).ravel(), (a == k).ravel()))
    matched = int((overlaps > 0.5).sum())  # above one half no object has two partners
    assert object_f1(a, b) == ObjectScore(matched, len(names_a) - matched, len(names_b) - matched)


def test_low_thresholds_match_as_many_pairs_as_possible() -> None:
    found, truth = np.zeros((1, 12), int), np.zeros((1, 12), int)
    found[0, 0:6], found[0, 6:9] = 1, 2
    truth[0, 0:2], truth[0, 2:8] = 1, 2  # found 1 overlaps both; found 2 the second alone
    score = object_f1(found, truth, min_iou=0.1)
    assert (score.true_positives, score.false_positives, score.false_negatives) == (2, 0, 0)


def test_shifted_squares_by_hand() -> None:
    truth = np.zeros((20, 20), bool)
    truth[2:8, 2:8] = truth[12:18, 12:18] = True
    found = np.zeros((20, 20), bool)
    found[2:8, 3:9] = True  # 30 of 42 pixels
    found[12:18, 15:21] = True  # 18 of 48
    found[0, 19] = True
    score = object_f1(found, truth)
    assert (score.true_positives, score.false_positives, score.false_negatives) == (1, 2, 1)
    assert (score.precision, score.recall, score.f1) == pytest.approx((1 / 3, 1 / 2, 0.4))
    assert score + score == ObjectScore(2, 4, 2)


def test_a_mask_falls_into_its_components_an_instance_map_does_not() -> None:
    diagonal = np.eye(4, dtype=bool)  # 8-connected: one object
    assert object_f1(diagonal, np.eye(4, dtype=int)) == ObjectScore(1, 0, 0)
    halves = np.array([[1, 1, 2, 2]])
    assert object_f1(halves, halves > 0) == ObjectScore(0, 2, 1)  # one half exactly is not above one half


def test_nothing_there_and_nothing_found() -> None:
    empty = np.zeros((3, 3), bool)
    assert mask_dice(empty, empty) == 1.0
    score = object_f1(empty, empty)
    assert (score.precision, score.recall, score.f1) == (1.0, 1.0, 1.0)
    assert object_f1(~empty, empty).f1 == object_f1(empty, ~empty).f1 == 0.0
    assert point_recall(np.empty((0, 2)), np.empty((0, 2)), 3) == 1.0
    assert point_recall(np.empty((0, 2)), [[1, 1]], 3) == 0.0


def test_recall_of_marks_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    centres, marks = rng.random((30, 2)) * 100, rng.random((50, 2)) * 100
    distance = np.sqrt(((marks[:, None] - centres[None]) ** 2).sum(-1)).min(1)
    for radius in (0.0, 5.0, 12.0):
        assert point_recall(centres, marks, radius) == pytest.approx((distance <= radius).mean())


def test_a_mark_near_the_pixels_of_a_large_nucleus_counts_with_labels() -> None:
    labels = np.zeros((40, 60), int)
    labels[10:30, 10:50] = 1
    marks = [[48, 12], [53, 20], [58, 20]]  # inside, 4 px off, 9 px off
    assert point_recall([[29.5, 19.5]], marks, 5) == 0.0
    assert point_recall([[29.5, 19.5]], marks, 5, labels) == pytest.approx(2 / 3)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="same field"):
        mask_dice(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="same field"):
        object_f1(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="negative"):
        object_f1(np.full((2, 2), -1), np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="min_iou is 1"):
        object_f1(np.zeros((2, 2), int), np.zeros((2, 2), int), 1.0)
    with pytest.raises(ValueError, match="radius is -1"):
        point_recall([[0, 0]], [[0, 0]], -1)
