"""Schedules of the learning rate and the weight decay: warm-up, then half a cosine (Loshchilov and Hutter, 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["WarmupCosine"]


@dataclass(frozen=True)
class WarmupCosine:
    """A value as a function of the step; without state, so that a resumed run needs nothing but its step.

    Rises linearly from ``start`` over the warm-up, reaches ``peak`` at its last step, then follows half a cosine to
    ``final``, which the last step of the run has.

    Args:
        peak: value after the warm-up.
        final: value at the end. A weight decay that grows has ``final > peak``.
        start: value that the warm-up rises from (the first step is one increment above it).
        warmup_epochs: length of the warm-up in epochs, may be a fraction.
        warmup_steps: or in steps; the larger of both counts.
        warmup_share: or as a share of the whole run. The warm-up never takes more than half of the run.
    """

    peak: float
    final: float = 0.0
    start: float = 0.0
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    warmup_share: float = 0.0

    def __post_init__(self) -> None:
        if min(self.warmup_epochs, self.warmup_steps, self.warmup_share) < 0:
            raise ValueError("a warm-up cannot be negative")

    def warmup(self, total_steps: int, epoch_length: int) -> int:
        """Steps of the warm-up in a run of that many steps."""
        asked = max(self.warmup_steps, round(self.warmup_epochs * epoch_length), round(self.warmup_share * total_steps))
        return min(asked, total_steps // 2)

    def __call__(self, step: int, total_steps: int, epoch_length: int) -> float:
        """The value for a step.

        Args:
            step: 0 for the first.
            total_steps: steps of the whole run.
            epoch_length: steps of an epoch.
        """
        warmup = self.warmup(total_steps, epoch_length)
        if step < warmup:
            return self.start + (self.peak - self.start) * (step + 1) / warmup
        span = max(1, total_steps - 1 - warmup)
        share = min(1.0, (step - warmup) / span)
        return self.final + (self.peak - self.final) * 0.5 * (1.0 + math.cos(math.pi * share))
