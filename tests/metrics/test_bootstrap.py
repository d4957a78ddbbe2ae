import numpy as np
import pytest

from cytossl_monai.metrics.bootstrap import bootstrap_intervals, bootstrap_metric


def test_interval_of_a_mean_is_the_textbooks():
    x = np.random.default_rng(0).normal(5, 2, 200)
    interval = bootstrap_metric(np.mean, x, n_resamples=3000)
    half = 1.96 * x.std(ddof=1) / np.sqrt(200)
    assert interval.value == pytest.approx(x.mean())
    assert interval.low == pytest.approx(x.mean() - half, abs=0.05)
    assert interval.high == pytest.approx(x.mean() + half, abs=0.05)


def test_coverage():
    rng = np.random.default_rng(1)
    covered = [
        (i := bootstrap_metric(np.mean, rng.exponential(1, 60), n_resamples=300, seed=s)).low <= 1 <= i.high
        for s in range(200)
    ]
    assert 0.87 <= np.mean(covered) <= 0.99


def test_slides_of_one_patient_widen_the_interval():
    values = np.repeat(np.random.default_rng(0).normal(size=20), 10)
    patients = np.repeat(np.arange(20), 10)
    alone, grouped = bootstrap_metric(np.mean, values), bootstrap_metric(np.mean, values, groups=patients)
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)


def test_patients_are_drawn_whole_and_strata_kept():
    patients, labels = np.repeat(np.arange(10), 3), np.repeat([0, 1] * 5, 3)
    seen = []

    def statistic(rows):
        counts = np.bincount(rows, minlength=30).reshape(10, 3)
        assert (counts == counts[:, :1]).all()
        seen.append(labels[rows].sum())
        return {"n": len(rows)}

    bootstrap_intervals(statistic, 30, patients, labels, n_resamples=50)
    assert set(seen) == {15}


def test_undefined_resamples_are_counted_out_and_none_is_invented():
    result = bootstrap_intervals(lambda rows: {"never": np.nan}, 5, n_resamples=50)["never"]
    assert result.n_resamples == 0
    assert np.isnan(result.low)
    assert result.as_dict()["low"] is None
    with pytest.raises(ValueError, match="no slides"):
        bootstrap_metric(np.mean, np.zeros(0))
