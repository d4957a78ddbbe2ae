"""The engine of inference: one iteration is one slide; reading, encoding and writing overlap."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.inferers import Inferer, SimpleInferer

from cytossl_monai.data.bags.features import read_features
from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.data.slides.cache import SlideCache
from cytossl_monai.inference.ahead import AheadLoader
from cytossl_monai.inference.embed import EmbedTimes, embed_to_file, is_current
from cytossl_monai.inference.encoder import require_trained_encoder
from cytossl_monai.inference.instances import stored_instances
from cytossl_monai.inference.prepare import fitting_batch, prepare_encoder, warn_of_tile_size
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
from cytossl_monai.utils.errors import failure
from cytossl_monai.utils.locks import item_lock
from cytossl_monai.utils.parallel import default_workers
from cytossl_monai.utils.report import RunReport

__all__ = ["SlideEvaluator"]


class SlideEvaluator(Evaluator):
    """Embeds each slide that the loader gives and hands it to ``postprocessing``; a slide that fails costs only itself.

    Items come with ``slide_id``, ``record`` and ``index``, or with ``problem`` (see `IndexSlided`). They leave with
    ``features`` (N, D) and ``encoder`` (its hash) and ``times``, and go through ``postprocessing`` in a thread, while
    the next slide is encoded. `postprocessing` may have a method ``current(item) -> str | None``: where that returns a
    message, the slide was done before and is left as it is.

    One line a slide goes into ``report``. ``run`` returns when everything is written.

    Args:
        device: where to encode; on ``cuda`` slides are decoded there as well, where cuCIM can.
        val_data_loader: gives the items, see `AheadLoader`.
        network: the encoder.
        features_dir: folder of the feature files, ``<slide_id>.h5``; those that are current are read, not made.
        report: where each slide is told.
        inferer: MONAI inferer that calls the encoder on batches of tiles.
        postprocessing: transforms of an item with features; what they raise is that slide's failure.
        batch_size: tiles at once; None finds once what fits.
        amp: bfloat16 autocast.
        num_threads: decoding threads (cuCIM); None takes one for each CPU core.
        dtype: how features are stored.
        encoder_name: kept in the feature files.
        val_handlers: Ignite handlers; ``engine.state.output`` is the item.
        progress: show progress bars.
        channels_last: see `prepare_encoder`.
        compile: see `prepare_encoder`.
        cache: copies slides ahead to a faster disk; give `IndexSlided` the same one.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: AheadLoader,
        network: Encoder,
        features_dir: str | os.PathLike[str],
        report: RunReport,
        inferer: Inferer | None = None,
        postprocessing: Callable[[dict[str, Any]], Any] | None = None,
        batch_size: int | None = 32,
        amp: bool = False,
        num_threads: int | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        encoder_name: str = "",
        val_handlers: Sequence[Any] | None = None,
        progress: bool = True,
        channels_last: bool = False,
        compile: bool = False,
        cache: SlideCache | None = None,
    ) -> None:
        super().__init__(
            device=torch.device(device), val_data_loader=val_data_loader, val_handlers=val_handlers, decollate=False
        )
        self.network, self.inferer, self.postprocess = network, inferer or SimpleInferer(), postprocessing
        self.features_dir, self.report = Path(features_dir), report
        self.batch_size, self.use_amp, self.dtype = batch_size, amp, dtype
        self.num_threads = default_workers() if num_threads is None else num_threads
        self.cache, self.items = cache, getattr(val_data_loader.dataset, "data", [])
        self.encoder_name, self.progress, self.switches = encoder_name, progress, (channels_last, compile)
        # The epoch ends before the run does: handlers of COMPLETED find every file written.
        self.add_event_handler(Events.EPOCH_COMPLETED, self._wait)
        self._hash, self._warned = "", False
        self._writer: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def run(self, global_epoch: int = 1) -> None:
        """Infer all slides.

        Raises:
            CheckpointError: before the first slide, when encoder or classifier are missing or do not belong together.
        """
        require_trained_encoder(self.network)
        self._hash = encoder_hash(self.network)
        self.network = prepare_encoder(self.network, self.state.device, *self.switches)
        prepare = getattr(self.postprocess, "prepare", None)
        if prepare is not None:
            prepare(self.network, self._hash)
        self.features_dir.mkdir(parents=True, exist_ok=True)
        with self.cache or nullcontext(), ThreadPoolExecutor(1, "evidence-writer") as self._writer:
            if self.cache is not None:
                self.cache.start([item["record"] for item in self.items], self._is_new)
            super().run(global_epoch)

    def _is_new(self, record: SlideRecord) -> bool:
        """Whether nothing is known of a slide yet; of others only a part is read again, if anything."""
        folder = getattr(self.postprocess, "output_dir", None)
        known = self.features_dir / f"{record.slide_id}.h5" if folder is None else folder / record.slide_id
        return not known.exists()

    def _wait(self) -> None:
        while self._pending:
            self._pending.pop(0).result()
        self.report.save()

    def _iteration(self, engine: Engine, batchdata: dict[str, Any]) -> dict[str, Any]:
        item, start = dict(batchdata), time.perf_counter()
        # Until the slide is written, no other run on the same folder works on it.
        item["held"] = held = ExitStack()
        held.enter_context(item_lock(self.features_dir, item["slide_id"], "inference"))
        if self.cache is not None:
            held.callback(self.cache.release, item["record"])
        try:
            message = self._embed(item)
        except Exception as error:  # noqa: BLE001 - every failure of a slide is its own, whatever it is
            item["problem"], message = ("failed", failure(error)), None
        # The slide's own time: while it waits for its turn, others are worked on.
        seconds = item.get("index_seconds", 0.0) + time.perf_counter() - start
        if message is not None:
            self.report.add(item["slide_id"], "current", message, seconds)
            held.close()
            return item
        # At most one slide waits to be written: what is held in memory stays bounded.
        while len(self._pending) > 1:
            self._pending.pop(0).result()
        assert self._writer is not None
        self._pending.append(self._writer.submit(self._finish, item, seconds))
        return item

    def _embed(self, item: dict[str, Any]) -> str | None:
        """Add the features; returns a message where the whole slide is current."""
        if "problem" in item:
            return None
        item["encoder"] = self._hash
        current = getattr(self.postprocess, "current", None)
        message = current(item) if current is not None else None
        if message is not None:
            return str(message)
        record, index = item["record"], item["index"]
        self._warned = self._warned or warn_of_tile_size(self.network, index.tile_size, index.mpp)
        path = self.features_dir / f"{record.slide_id}.h5"
        item["features_path"], item["times"] = str(path), EmbedTimes()
        if is_current(path, record.path, index, self._hash, self.dtype):
            stored = read_features(path, self._hash)
            item["features"], item["index"] = stored.features, stored_instances(index, stored.coords)
            return None
        if self.batch_size is None:
            self.batch_size = fitting_batch(self.network, index.tile_size, self.state.device, self.use_amp)
        features, item["index"] = embed_to_file(
            path,
            record,
            index,
            self.network,
            self._hash,
            self.encoder_name,
            self.batch_size,
            self.state.device,
            self.dtype,
            self.use_amp,
            self.num_threads,
            self.inferer,
            item["times"],
            self.progress,
        )
        item["features"] = read_features(path).features if self.dtype == "float16" else features
        return None

    def _finish(self, item: dict[str, Any], seconds: float) -> None:
        """Write the evidence of one slide and tell of it; runs in the writer's thread."""
        message, start = "", time.perf_counter()
        try:
            if self.postprocess is not None:
                message = str(self.postprocess(item).get("message", ""))
        except Exception as error:  # noqa: BLE001 - every failure of a slide is its own, whatever it is
            item["problem"] = ("failed", failure(error))
        item.pop("held").close()
        status, why = item.get("problem", ("done", message))
        self.report.add(item["slide_id"], status, why, seconds + time.perf_counter() - start)
