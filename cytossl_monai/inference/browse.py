"""A slide's cells on a page that finds look-alikes: fields centred on nuclei, embedded, nothing trained."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.index.fields import NucleusFields
from cytossl_monai.inference.embed import embed_to_file
from cytossl_monai.inference.encoder import require_trained_encoder
from cytossl_monai.inference.slides import IndexSlided
from cytossl_monai.networks.nets.encoder import encoder_hash
from cytossl_monai.utils.errors import failure
from cytossl_monai.utils.report import RunReport
from cytossl_monai.visualize.cells_page import write_cells_page

__all__ = ["CellBrowser"]

logger = logging.getLogger(__name__)


class CellBrowser:
    """Slides in; for each a feature file of its cells and a page on which a click on a cell finds those most like it.

    Writes ``<slide_id>/cells.html``, ``<slide_id>/cells.h5`` (features and places, as CLAM and TRIDENT read them) and
    ``report.csv``. A slide that fails is reported, the others go on.

    Args:
        records: the slides.
        encoder: as `bundle_encoder` gives it.
        output_dir: folder to write to.
        tile_size: side of a field in pixels.
        mpp: micrometres per pixel of a field.
        max_cells: the most cells of a slide.
        seed: of the draw of cells.
        batch_size: fields at once.
        device: where to encode.
        num_threads: threads that read; None takes one for each core.
    """

    def __init__(
        self,
        records: Sequence[SlideRecord],
        encoder: nn.Module,
        output_dir: str | os.PathLike[str],
        tile_size: int = 64,
        mpp: float = 0.375,
        max_cells: int = 1000,
        seed: int = 0,
        batch_size: int = 64,
        device: str | torch.device = "cpu",
        num_threads: int | None = None,
    ) -> None:
        if max_cells < 1 or tile_size < 1 or not mpp > 0:
            raise ValueError(f"max_cells, tile_size and mpp must be above 0, got {max_cells}, {tile_size}, {mpp}")
        self.records, self.encoder, self.folder = list(records), encoder, Path(output_dir)
        self.batch_size, self.device = batch_size, device
        fields = NucleusFields(tile_size, mpp, max_cells, odd_share=0.0, seed=seed)  # a page of its usual cells
        self.index = IndexSlided(self.folder / "cache" / "index", num_threads=num_threads, device=device, fields=fields)

    def run(self) -> RunReport:
        """Index what is not indexed, then write each slide's features and page.

        Raises:
            CheckpointError: where the encoder has no weights.
        """
        require_trained_encoder(self.encoder)
        self.folder.mkdir(parents=True, exist_ok=True)
        report = RunReport("cells", self.folder / "report.csv")
        for record in self.records:
            start = time.perf_counter()
            item = self.index({"slide_id": record.slide_id, "record": record})
            if "problem" in item:
                status, why = item["problem"]
                report.add(record.slide_id, status, why, time.perf_counter() - start)
                continue
            try:
                count = self._browse(record, item["index"])
            except Exception as error:  # noqa: BLE001 - every failure of a slide is its own, whatever it is
                report.add(record.slide_id, "failed", failure(error), time.perf_counter() - start)
                continue
            report.add(record.slide_id, "done", f"{count} cells", time.perf_counter() - start)
        report.save()
        return report

    def _browse(self, record: SlideRecord, fields: TileIndex) -> int:
        with open_slide(record.path, mpp=record.mpp) as slide:
            pictures = np.asarray(slide.read_regions(fields.coords, fields.tile_size, mpp=fields.mpp))
        folder = self.folder / record.slide_id
        source = str(getattr(self.encoder, "source", ""))
        features = embed_to_file(
            folder / "cells.h5",
            record,
            fields,
            self.encoder,
            encoder_id=encoder_hash(self.encoder),  # type: ignore[arg-type]
            encoder_name=Path(source).stem,
            batch_size=self.batch_size,
            device=self.device,
            dtype="float32",
            amp=False,
            num_threads=1,
        )
        write_cells_page(folder / "cells.html", record.slide_id, pictures, features, fields, Path(source).name)
        return len(fields)
