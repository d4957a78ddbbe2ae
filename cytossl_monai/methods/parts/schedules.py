"""Schedules as functions of progress, the share of the training that is done: 0 at the start, 1 at the end.

A function of progress has no state: a run that is resumed, or given other batch sizes, follows the same curve.
"""

from __future__ import annotations

import math

__all__ = ["check_progress", "cosine", "linear_warmup"]


def check_progress(progress: float) -> float:
    """Return ``progress`` as a float.

    Raises:
        ValueError: when it is outside [0, 1] or not a number.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must lie in [0, 1], got {progress}")
    return float(progress)


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine wave from ``start`` at progress 0 to ``end`` at progress 1."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * check_progress(progress)))


def linear_warmup(start: float, end: float, progress: float, warmup: float) -> float:
    """A straight line from ``start`` to ``end`` over the first ``warmup`` share of the training, then ``end``.

    Args:
        start: value at progress 0.
        end: value from progress ``warmup`` on.
        progress: in [0, 1].
        warmup: in [0, 1]; 0 means ``end`` from the first step.
    """
    progress = check_progress(progress)
    if warmup <= 0.0 or progress >= warmup:
        return end
    return start + (end - start) * progress / warmup
