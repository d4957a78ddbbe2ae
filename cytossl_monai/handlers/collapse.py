"""Is the representation collapsing? Figures that tell early, and a warning in words."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor
from torch.nn import functional as F

from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.utils.distributed import is_main

__all__ = ["CollapseMonitor", "feature_spread", "rankme"]

logger = logging.getLogger(__name__)


def feature_spread(features: Tensor) -> float:
    """Standard deviation of normalised features times sqrt(D), averaged over dimensions.

    1 for features spread evenly over the sphere, 0 when all images get the same one (Chen and He, SimSiam, CVPR 2021).

    Args:
        features: (N, D), N >= 2.
    """
    normalised = F.normalize(features.double(), dim=1)
    return float(normalised.std(dim=0).mean()) * math.sqrt(features.shape[1])


def rankme(features: Tensor, eps: float = 1.0e-7) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (Garrido et al., RankMe, ICML 2023).

    Args:
        features: (N, D).
        eps: keeps the logarithm finite.

    Returns:
        between 1 (one direction) and min(N, D) (all alike).
    """
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp_min(1e-30) + eps
    return float(torch.exp(-(share * share.log()).sum()))


class CollapseMonitor:
    """Reports ``feature_std``, ``rankme``, and what the method says of its teacher; warns when they fall.

    Features of the last steps are pooled until there are ``samples``, as the rank cannot exceed their number.

    Args:
        every_steps: steps between two looks.
        samples: features to pool.
        min_spread: below it, complete collapse: all images get nearly the same feature.
        min_rank: below this share of the possible rank, dimensional collapse: few directions are used.
        min_entropy: nats; a teacher (DINO, iBOT) whose targets have a mean of less entropy sees one class everywhere,
            and one whose targets differ from their mean by less tells nothing apart. Judged after a tenth of the run,
            as every teacher begins so.
    """

    def __init__(
        self,
        every_steps: int = 50,
        samples: int = 512,
        min_spread: float = 0.1,
        min_rank: float = 0.02,
        min_entropy: float = 0.02,
    ) -> None:
        self.every_steps, self.samples = max(1, every_steps), samples
        self.min_spread, self.min_rank, self.min_entropy = min_spread, min_rank, min_entropy
        self._pool: deque[Tensor] = deque()
        self.warnings: list[str] = []

    def attach(self, engine: SSLTrainer) -> None:
        """Watch a trainer's steps; the window of features is part of its checkpoints."""
        engine.stateful["collapse"] = self
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)

    def _step(self, engine: SSLTrainer) -> None:
        output = engine.state.output
        if "features" in output:
            self._pool.append(output["features"].float())
            while len(self._pool) > 1 and sum(map(len, self._pool)) - len(self._pool[0]) >= self.samples:
                self._pool.popleft()
        if engine.state.iteration % self.every_steps and engine.state.iteration != engine.total_steps:
            return
        figures = {}
        if self._pool and sum(map(len, self._pool)) >= 2:
            features = torch.cat([part.cpu() for part in self._pool])
            figures = {"feature_std": feature_spread(features), "rankme": rankme(features)}
            self._judge(engine.state.iteration, figures, min(features.shape))
        if "teacher_entropy" in output and "teacher_spread" in output:
            entropy, spread = float(output["teacher_entropy"]), float(output["teacher_spread"])
            figures["teacher_information"] = spread - entropy
            if engine.state.iteration > 0.1 * engine.total_steps:
                self._judge_teacher(engine.state.iteration, entropy, spread)
        if figures:
            engine.report(**figures)

    def state_dict(self) -> dict[str, Any]:
        """The features of the last steps, oldest first: a resumed run looks at the same window."""
        return {"features": [part.cpu() for part in self._pool]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the window of the run that is resumed."""
        self._pool = deque(state["features"])

    def _judge(self, step: int, figures: dict[str, float], possible: int) -> None:
        """Say in words what the figures mean."""
        if figures["feature_std"] < self.min_spread:
            self._warn(
                f"Step {step}: collapse. All images get nearly the same feature (spread "
                f"{figures['feature_std']:.3f}; 1 is healthy). Lower the learning rate, lengthen the warm-up, or raise "
                "the teacher's momentum; for DINO, lower the teacher's temperature or check the centring."
            )
        elif figures["rankme"] < max(1.5, self.min_rank * possible):
            self._warn(
                f"Step {step}: dimensional collapse. The features use about {figures['rankme']:.1f} of {possible} "
                "directions. Larger batches, stronger views or a KoLeo term spread them."
            )

    def _judge_teacher(self, step: int, entropy: float, spread: float) -> None:
        if spread < self.min_entropy:
            self._warn(
                f"Step {step}: the teacher gives all images the same class (entropy of its mean target {spread:.3f} "
                "nats). Centring is too weak: raise the teacher's temperature, or use Sinkhorn-Knopp."
            )
        elif spread - entropy < self.min_entropy:
            self._warn(
                f"Step {step}: the teacher gives all images the same target (they differ from their mean by "
                f"{spread - entropy:.3f} nats). Lower the teacher's temperature or the learning rate."
            )

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        if is_main():
            logger.warning(message)
