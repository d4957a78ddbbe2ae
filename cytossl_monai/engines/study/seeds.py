"""Seeds: what a study knows by doing every run several times, from other starts and in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from cytossl_monai.engines.study.representation import FIGURES

__all__ = ["mean_over_seeds", "paired_over_seeds", "student_interval"]


def student_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of independent values and its interval, Student's t.

    Args:
        values: (N,) numbers.
        level: of the interval.

    Returns:
        mean, low, high; the ends are NaN for a single value, of which no interval can be known, all three for none.
    """
    array = np.asarray(values, float)
    if not len(array):
        return float("nan"), float("nan"), float("nan")
    mean = float(array.mean())
    if len(array) == 1:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.5 + level / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return mean, mean - half, mean + half


def paired_over_seeds(
    rows: Sequence[Mapping[str, Any]], arm: str, base: str, task: str, figure: str, level: float = 0.95
) -> tuple[float, float, float, int]:
    """How much an arm gains over another, paired over the seeds that both have.

    Args:
        rows: of :meth:`AblationStudy.evaluate`, the seed in place of the arm (as :class:`PaperStudy` has them).
        arm: the one.
        base: the other.
        task: of both.
        figure: of both.
        level: of the interval, Student's t over the seeds.

    Returns:
        mean difference, low, high (NaN for a single pair, of which no interval can be known), and the number of pairs.
    """
    value = {(r["method"], r["arm"]): float(r[figure]) for r in rows if r["task"] == task}
    seeds = sorted({seed for method, seed in value if method == arm} & {s for m, s in value if m == base})
    gains = [value[arm, seed] - value[base, seed] for seed in seeds]
    return *student_interval(gains, level), len(gains)


def mean_over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a method, arm and task: of each figure the mean of its seeds and its interval over them.

    Args:
        rows: of :meth:`AblationStudy.rows`, each with its ``seed``.

    Returns:
        the rows, with ``seeds`` in place of ``seed``: how many there are. ``images_per_s`` is the seeds' mean.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["arm"], row["task"]), []).append(row)
    means = []
    for same in groups.values():
        mean = {name: value for name, value in same[0].items() if name != "seed" and not name.endswith("_folds")}
        for figure in FIGURES:
            mean[figure], mean[f"{figure}_low"], mean[f"{figure}_high"] = student_interval([r[figure] for r in same])
        speeds = [row["images_per_s"] for row in same if row.get("images_per_s") is not None]
        means.append({**mean, "seeds": len(same), **({"images_per_s": float(np.mean(speeds))} if speeds else {})})
    return means
