"""kNN on a labelled table while training: the figure by which the best checkpoint is chosen."""

from __future__ import annotations

import logging

from ignite.engine import Events

from cytossl_monai.data.tiles.labelled import LabelledImages
from cytossl_monai.engines.ssl.sharding import whole_encoder
from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.metrics.probe import knn_probe, linear_probe
from cytossl_monai.utils.distributed import is_main

__all__ = ["OnlineKNN", "OnlineLinearProbe"]

logger = logging.getLogger(__name__)


class OnlineKNN:
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
        self.images, self.every_epochs = images, max(1, every_epochs)
        self.k, self.temperature, self.batch_size = k, temperature, batch_size
        self._done = -1

    def attach(self, engine: SSLTrainer) -> None:
        """Evaluate at the ends of epochs; attach before the handler that saves. The first process does it."""
        if self.images is None:
            return
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.every_epochs), self.evaluate)
        engine.add_event_handler(Events.COMPLETED, self.evaluate)

    def evaluate(self, engine: SSLTrainer) -> None:
        """Evaluate the encoder as it is now and report ``knn``."""
        if self.images is None or self._done == engine.state.iteration:
            return
        self._done = engine.state.iteration
        encoder = whole_encoder(engine.method)
        if not is_main():
            return
        features = self.images.features(encoder, engine.state.device, self.batch_size)
        result = knn_probe(features.numpy(), self.images.labels, self.images.folds, self.k, self.temperature)
        engine.report(knn=result.balanced_accuracy.mean, knn_auc=result.auc.mean)
        logger.info(
            "Step %d: kNN balanced accuracy %s, AUC %s.", engine.state.iteration, result.balanced_accuracy, result.auc
        )


class OnlineLinearProbe:
    """Reports ``linear_probe`` with ``_low`` and ``_high`` (95 % interval over folds), and ``linear_probe_auc``.

    Args:
        images: what to classify; None: nothing is done.
        every_epochs: epochs between two evaluations; 0: only at the end of the run, as it costs more than kNN.
        batch_size: images at a time.
    """

    def __init__(self, images: LabelledImages | None, every_epochs: int = 0, batch_size: int = 64) -> None:
        self.images, self.every_epochs, self.batch_size = images, every_epochs, batch_size
        self._done = -1

    def attach(self, engine: SSLTrainer) -> None:
        """Evaluate when it is time. The first process does it."""
        if self.images is None:
            return
        if self.every_epochs:
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.every_epochs), self.evaluate)
        engine.add_event_handler(Events.COMPLETED, self.evaluate)

    def evaluate(self, engine: SSLTrainer) -> None:
        """Fit and report."""
        if self.images is None or self._done == engine.state.iteration:
            return
        self._done = engine.state.iteration
        encoder = whole_encoder(engine.method)
        if not is_main():
            return
        features = self.images.features(encoder, engine.state.device, self.batch_size)
        images = self.images
        result = linear_probe(features.numpy(), images.labels, images.folds, images.groups)
        figure = result.balanced_accuracy
        engine.report(
            linear_probe=figure.mean,
            linear_probe_low=figure.low,
            linear_probe_high=figure.high,
            linear_probe_auc=result.auc.mean,
        )
        logger.info("Linear probe: balanced accuracy %s, AUC %s.", figure, result.auc)
