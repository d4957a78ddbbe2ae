"""How sure a figure is: bootstrap intervals that respect patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["Interval", "bootstrap_intervals", "bootstrap_metric"]


@dataclass(frozen=True)
class Interval:
    """A figure with its interval.

    Args:
        value: the figure on all slides.
        low: lower end; NaN when too few resamples defined the figure.
        high: upper end.
        level: share of resamples inside, 0.95 as a rule.
        n_resamples: resamples in which the figure was defined.
    """

    value: float
    low: float
    high: float
    level: float = 0.95
    n_resamples: int = 0

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def as_dict(self) -> dict[str, float | None]:
        """For JSON: NaN becomes None."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


def bootstrap_intervals(
    statistic: Callable[[np.ndarray], Mapping[str, float]],
    n: int,
    groups: Sequence[str] | np.ndarray | None = None,
    strata: Sequence[int] | np.ndarray | None = None,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile bootstrap intervals of several figures at once.

    Whole patients are drawn with replacement, since slides of one patient are not independent; with ``strata`` as many
    patients of every stratum as there are, so that no resample is without positives.

    Args:
        statistic: takes slide numbers (with repeats), gives figures by name; NaN where one is undefined.
        n: number of slides.
        groups: (n,) patient of every slide; None: every slide is its own.
        strata: (n,) class of every slide (a patient belongs to the highest of its slides); None: one stratum.
        n_resamples: how many draws.
        level: share of the draws inside the interval.
        seed: same seed, same interval.

    Returns:
        an interval for every figure.

    Raises:
        ValueError: for n = 0, lengths that differ, or a level outside (0, 1).
    """
    if n < 1:
        raise ValueError("no slides to draw from")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    owners = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    classes = np.zeros(n, dtype=np.int64) if strata is None else np.asarray(strata, dtype=np.int64)
    if len(owners) != n or len(classes) != n:
        raise ValueError(f"{n} slides but {len(owners)} groups and {len(classes)} strata")
    members = [np.flatnonzero(owners == owner) for owner in range(int(owners.max()) + 1)]
    stratum = np.array([classes[m].max() for m in members])
    pools = [np.flatnonzero(stratum == s) for s in np.unique(stratum)]
    values = dict(statistic(np.arange(n)))
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(n_resamples):
        chosen = np.concatenate([rng.choice(pool, len(pool)) for pool in pools])
        drawn = statistic(np.concatenate([members[owner] for owner in chosen]))
        for name, value in drawn.items():
            if np.isfinite(value):
                draws[name].append(float(value))
    tail = 100 * (1 - level) / 2
    result = {}
    for name, value in values.items():
        # With few defined resamples the percentiles would be an invention.
        known = len(draws[name]) >= 20
        low, high = np.percentile(draws[name], [tail, 100 - tail]) if known else (np.nan, np.nan)
        result[name] = Interval(float(value), float(low), float(high), level, len(draws[name]))
    return result


def bootstrap_metric(
    metric: Callable[..., float], *arrays: np.ndarray, groups: Sequence[str] | np.ndarray | None = None, **settings: Any
) -> Interval:
    """Interval of one figure ``metric(*arrays)`` over arrays; ``settings`` as in ``bootstrap_intervals``."""
    return bootstrap_intervals(
        lambda rows: {"value": metric(*(np.asarray(a)[rows] for a in arrays))}, len(arrays[0]), groups, **settings
    )["value"]
