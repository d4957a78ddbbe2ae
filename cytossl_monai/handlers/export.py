"""The result of a run: the encoder's weights, its constructor arguments and its normalisation, in one file."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Events

from cytossl_monai.engines.ssl.sharding import name_of, whole_encoder
from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.networks.build import network_config
from cytossl_monai.networks.files import save_encoder
from cytossl_monai.utils.distributed import is_main
from cytossl_monai.utils.errors import SettingError, reason
from cytossl_monai.utils.files import require_writable

__all__ = ["EncoderExport"]

logger = logging.getLogger(__name__)
_KEPT = ("license", "commercial", "limits", "source", "citation", "continued_from")


class EncoderExport:
    """Writes ``models/model.pt`` at the end of a run.

    Args:
        path: the file.
        meta: facts to keep with it, JSON-able.
    """

    def __init__(self, path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None) -> None:
        self.path, self.meta = Path(path), dict(meta or {})

    def attach(self, engine: SSLTrainer) -> None:
        """Write in the first process when the run has finished; one that was stopped early leaves the old file."""
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _check(self, engine: SSLTrainer) -> None:
        """Say before the training, not after it, that its result could not be written."""
        encoder: Any = engine.method.encoder
        if is_main():
            require_writable(self.path.parent)
        try:
            network_config(encoder.network)
        except (AttributeError, ValueError) as error:
            raise SettingError(
                f"the trained encoder could not be written to {self.path} ({reason(error)}); take a network of "
                "cytossl_monai.networks in an Encoder, or convert yours with to_sr_transformer"
            ) from error

    def _write(self, engine: SSLTrainer) -> None:
        engine.ensure_finite()
        encoder: Any = whole_encoder(engine.method)
        if not is_main():
            return
        figures = {k: float(v) for k, v in engine.state.metrics.items() if isinstance(v, int | float)}
        # Whoever trains on from a published encoder is bound by its licence: the file goes on saying so.
        begun = {key: value for key, value in getattr(encoder, "meta", {}).items() if key in _KEPT}
        if getattr(encoder, "meta", {}).get("name"):
            begun["continued_from"] = encoder.meta["name"]
        dataset: Any = getattr(engine.data_loader, "dataset", None)
        tile = getattr(getattr(dataset, "dataset", dataset), "tile", None)  # of a cache the data set behind it
        if tile is not None:
            begun |= {"tile_size": tile[0], "mpp": tile[1]}
        meta = {
            **begun,
            **self.meta,
            "method": name_of(engine.method),
            "steps": int(engine.state.iteration),
            "epochs": int(engine.state.epoch),
            "metrics": figures,
        }
        save_encoder(self.path, encoder, meta)
        logger.info("Wrote the encoder to %s.", self.path)
