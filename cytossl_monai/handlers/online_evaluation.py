"""kNN on a labelled table while training: the figure by which the best checkpoint is chosen."""

from __future__ import annotations

import logging

import numpy as np
from ignite.engine import Events

from cytossl_monai.data.tiles.labelled import LabelledImages
from cytossl_monai.engines.ssl.sharding import whole_encoder
from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.metrics.probe import knn_probe, linear_probe
from cytossl_monai.utils.distributed import is_main

__all__ = ["OnlineKNN", "OnlineLinearProbe"]

logger = logging.getLogger(__name__)


class _OnlineEvaluation:
    """When an evaluation on labelled images is due, and who does it; a subclass says what is measured.

    It does not touch the training: modes are put back and every step seeds its own randomness.

    Args:
        images: what to classify; None: nothing is done (no labels given).
        every_epochs: epochs between two evaluations; 0: only at the end of the run.
        batch_size: images at a time.
    """

    def __init__(self, images: LabelledImages | None, every_epochs: int, batch_size: int) -> None:
        self.images, self.every_epochs, self.batch_size = images, every_epochs, batch_size
        self._done = -1

    def attach(self, engine: SSLTrainer) -> None:
        """Evaluate when it is time; attach before the handler that saves. The first process does it."""
        if self.images is None:
            return
        if is_main():  # an image that cannot be read would else cost the first epoch, which is saved after this
            engine.add_event_handler(Events.STARTED, self.images.load)
        if self.every_epochs:
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.every_epochs), self.evaluate)
        engine.add_event_handler(Events.COMPLETED, self.evaluate)

    def evaluate(self, engine: SSLTrainer) -> None:
        """Evaluate the encoder as it is now and report the figures."""
        if self.images is None or self._done == engine.state.iteration:
            return
        self._done = engine.state.iteration
        engine.ensure_finite()  # a probe would say of spoilt weights that its input is
        encoder = whole_encoder(engine.method)
        if not is_main():
            return
        features = self.images.features(encoder, engine.state.device, self.batch_size)
        engine.report(**self.measure(self.images, features.numpy(), engine.state.iteration))

    def measure(self, images: LabelledImages, features: np.ndarray, step: int) -> dict[str, float]:
        """The figures of features (N, D) float32 of the images, by name; logged with the step."""
        raise NotImplementedError


class OnlineKNN(_OnlineEvaluation):
    """Reports ``knn`` (balanced accuracy) and ``knn_auc`` (macro AUC), every so many epochs and at the end.

    Both are cross-validated by groups; votes are weighted by class.

    It does not touch the training: modes are put back and every step seeds its own randomness.

    Args:
        images: what to classify; None: nothing is done (no labels given).
        every_epochs: epochs between two evaluations.
        k: neighbours.
        temperature: of the votes.
        batch_size: images at a time.
    """

    def __init__(
        self,
        images: LabelledImages | None,
        every_epochs: int = 1,
        k: int = 20,
        temperature: float = 0.07,
        batch_size: int = 64,
    ) -> None:
        super().__init__(images, max(1, every_epochs), batch_size)
        self.k, self.temperature = k, temperature

    def measure(self, images: LabelledImages, features: np.ndarray, step: int) -> dict[str, float]:
        """See the base."""
        result = knn_probe(features, images.labels, images.folds, self.k, self.temperature)
        logger.info("Step %d: kNN balanced accuracy %s, AUC %s.", step, result.balanced_accuracy, result.auc)
        return {"knn": result.balanced_accuracy.mean, "knn_auc": result.auc.mean}


class OnlineLinearProbe(_OnlineEvaluation):
    """Reports ``linear_probe`` with ``_low`` and ``_high`` (95 % interval over folds), and ``linear_probe_auc``.

    Args:
        images: what to classify; None: nothing is done.
        every_epochs: epochs between two evaluations; 0: only at the end of the run, as it costs more than kNN.
        batch_size: images at a time.
    """

    def __init__(self, images: LabelledImages | None, every_epochs: int = 0, batch_size: int = 64) -> None:
        super().__init__(images, every_epochs, batch_size)

    def measure(self, images: LabelledImages, features: np.ndarray, step: int) -> dict[str, float]:
        """See the base."""
        result = linear_probe(features, images.labels, images.folds, images.groups)
        figure = result.balanced_accuracy
        logger.info("Linear probe: balanced accuracy %s, AUC %s.", figure, result.auc)
        return {
            "linear_probe": figure.mean,
            "linear_probe_low": figure.low,
            "linear_probe_high": figure.high,
            "linear_probe_auc": result.auc.mean,
        }
