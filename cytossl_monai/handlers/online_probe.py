"""A linear probe on a labelled table while training."""

from __future__ import annotations

import logging

from ignite.engine import Events

from cytossl_monai.engines.distributed import is_main
from cytossl_monai.engines.sharding import whole_encoder
from cytossl_monai.engines.ssl_trainer import SSLTrainer
from cytossl_monai.handlers.embedding import LabelledImages
from cytossl_monai.metrics.linear_probe import linear_probe

__all__ = ["OnlineLinearProbe"]

logger = logging.getLogger(__name__)


class OnlineLinearProbe:
    """Reports ``linear_probe``, ``linear_probe_low`` and ``linear_probe_high`` (95 % interval over folds).

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
        result = linear_probe(features.numpy(), self.images.labels, self.images.folds)
        engine.report(linear_probe=result.mean, linear_probe_low=result.low, linear_probe_high=result.high)
        logger.info("Linear probe: balanced accuracy %.3f (%.3f to %.3f).", result.mean, result.low, result.high)
