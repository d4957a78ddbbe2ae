import numpy as np
import pytest

from cytossl_monai.data.bags.splits import assign_folds, check_patients, fold_numbers, hold_out, split_items
from cytossl_monai.utils.errors import TableError


def cohort(seed, n=60, classes=3):
    rng = np.random.default_rng(seed)
    patients = [f"p{rng.integers(0, 40)}" for _ in range(n)]
    return rng.integers(0, classes, n), patients


@pytest.mark.parametrize("seed", range(5))
def test_patients_stay_together_and_classes_are_spread(seed):
    labels, patients = cohort(seed)
    folds = assign_folds(labels, patients, 4, seed)
    check_patients(patients, folds.tolist())
    for c in range(3):
        counts = np.bincount(folds[labels == c], minlength=4)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 4
    np.testing.assert_array_equal(folds, assign_folds(labels, patients, 4, seed))


def test_balanced_when_every_patient_has_one_slide():
    labels = np.array([0] * 23 + [1] * 17)
    folds = assign_folds(labels, [str(i) for i in range(40)], 5)
    assert np.ptp(np.bincount(folds[labels == 0])) <= 1
    assert np.ptp(np.bincount(folds[labels == 1])) <= 1
    assert np.ptp(np.bincount(folds)) <= 2


def test_impossible_folds():
    with pytest.raises(TableError, match="at least 5 patients, the table has 4"):
        assign_folds([0, 1, 0, 1, 1], list("aabcd"), 5)
    with pytest.raises(TableError, match="class 1 has 2"):
        assign_folds([0] * 10 + [1, 1], [str(i) for i in range(12)], 3)
    with pytest.raises(ValueError, match="at least 2"):
        assign_folds([0, 1], ["a", "b"], 1)


def item(i, label, patient=None, **kw):
    base = {"slide_id": f"s{i}", "patient_id": patient or f"p{i}", "label": label, "classes": ["n", "p"]}
    return {**base, "fold": None, "split": None, **kw}


def test_drawn_split_holds_out_the_test_fold():
    items = [item(i, i % 2) for i in range(20)]
    sides = split_items(items, 5, fold=1, test_fold=0)
    assert sorted(i["slide_id"] for s in sides.values() for i in s) == sorted(i["slide_id"] for i in items)
    assert [len(sides[s]) for s in ("train", "val", "test")] == [12, 4, 4]
    assert split_items(items, 5, 0)["test"] == []
    with pytest.raises(ValueError, match="both 1"):
        split_items(items, 5, 1, 1)
    with pytest.raises(ValueError, match="fold is 7"):
        split_items(items, 5, 7)


def test_given_split_and_folds_are_kept():
    split = ["train"] * 8 + ["validation"] * 4 + ["testing"] * 4
    sides = split_items([item(i, i % 2, split=s) for i, s in enumerate(split)])
    assert [len(sides[s]) for s in ("train", "val", "test")] == [8, 4, 4]
    folds = [item(i, i % 2, fold=i // 2 % 3) for i in range(12)]
    assert {i["fold"] for i in split_items(folds, fold=2)["val"]} == {2}
    no_val = split_items([item(i, i % 2, split="test" if i > 15 else "train") for i in range(20)], 4)
    assert [len(no_val[s]) for s in ("train", "val", "test")] == [12, 4, 4]
    folds[0]["fold"] = None
    with pytest.raises(TableError, match="s0 has none"):
        fold_numbers(folds, 3)


def test_bad_splits():
    items = [item(i, i % 2, split="train" if i < 8 else "val") for i in range(12)]
    items[8]["patient_id"] = "p0"
    with pytest.raises(TableError, match="patient p0 is on both sides of the split"):
        split_items(items)
    one_class = [item(i, int(i >= 8), split="train" if i < 8 else "val") for i in range(12)]
    with pytest.raises(TableError, match="train slides: only one class, no slide of p"):
        split_items(one_class)
    no_positive = [item(i, int(i < 3), split="train" if i < 8 else "val") for i in range(12)]
    with pytest.raises(TableError, match="val slides: only one class, no slide of p"):
        split_items(no_positive)
    with pytest.raises(TableError, match="must say train, val or test"):
        split_items([item(0, 0, split="train"), item(1, 1, split="odd")])


@pytest.mark.parametrize("seed", range(3))
def test_holdout_draws_patients_of_every_class(seed):
    labels, patients = cohort(seed)
    out = hold_out(labels, patients, 0.3, seed)
    check_patients(patients, out.tolist())
    assert 0.2 < len({p for p, o in zip(patients, out) if o}) / len(set(patients)) < 0.4
    for c in range(3):
        assert out[labels == c].any()
        assert not out[labels == c].all()
    np.testing.assert_array_equal(out, hold_out(labels, patients, 0.3, seed))
    assert not np.array_equal(out, hold_out(labels, patients, 0.3, seed + 1))


def test_holdout_beside_folds():
    items = [item(i, i % 2) for i in range(40)]
    sides = split_items(items, 5, fold=2, holdout=0.3)
    assert sorted(i["slide_id"] for s in sides.values() for i in s) == sorted(i["slide_id"] for i in items)
    assert len(sides["test"]) == 12
    assert 5 <= len(sides["val"]) <= 6
    again = split_items(items, 4, 0, holdout=0.3)["test"]
    assert {i["slide_id"] for i in sides["test"]} == {i["slide_id"] for i in again}
    with pytest.raises(ValueError, match=r"holdout 0.3 and test_fold 1"):
        split_items(items, 5, 0, 1, holdout=0.3)
    with pytest.raises(ValueError, match=r"holdout is the share"):
        split_items(items, 5, 0, holdout=1.0)
    with pytest.raises(TableError, match="class 1 has one patient"):
        hold_out([0, 0, 0, 1], list("abcd"), 0.3)


def test_one_class_needs_negatives_alone():
    negatives = [item(i, 0) for i in range(12)]
    assert len(split_items(negatives, 3, one_class=True)["train"]) == 8
    with pytest.raises(TableError, match="only one class"):
        split_items(negatives, 3)
    with pytest.raises(TableError, match="one-class detection learns from n slides"):
        split_items([item(i, 1) for i in range(12)], 3, one_class=True)
