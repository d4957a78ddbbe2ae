"""A slide's cells on a page that finds look-alikes: fields centred on nuclei, embedded, nothing trained."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from cytossl_monai.data.bags.features import read_features
from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.index.fields import NucleusFields
from cytossl_monai.inference.embed import embed_to_file, is_current
from cytossl_monai.inference.encoder import require_trained_encoder
from cytossl_monai.inference.instances import in_words, stored_instances
from cytossl_monai.inference.slides import IndexSlided
from cytossl_monai.networks.nets.encoder import encoder_hash
from cytossl_monai.utils.errors import SettingError
from cytossl_monai.utils.report import RunReport
from cytossl_monai.visualize.cells_page import MAX_SIDE, write_cells_page

__all__ = ["CellBrowser"]

logger = logging.getLogger(__name__)


class CellBrowser:
    """Slides in; for each a feature file of its cells and a page on which a click on a cell finds those most like it.

    Writes ``<slide_id>/cells.html``, ``<slide_id>/cells.h5`` (features and places, as CLAM and TRIDENT read them) and
    ``report.csv``. What is there already, of the same slide, cells and encoder, stays. A slide that fails is reported,
    the others go on.

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
        if tile_size > MAX_SIDE:
            raise SettingError(
                f"tile_size is {tile_size}; a page of cells can show fields of at most {MAX_SIDE} pixels; give a "
                "smaller one (64 at 0.375 um is a cell and what is around it)"
            )
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
        try:
            for record in self.records:
                with report.item(record.slide_id) as line:
                    item = self.index({"slide_id": record.slide_id, "record": record})
                    if "problem" in item:
                        line.status, line.message = item["problem"]
                    else:
                        line.status, line.message = self._browse(record, item["index"])
        finally:
            report.save()
        return report

    def _browse(self, record: SlideRecord, asked: TileIndex) -> tuple[Literal["done", "current"], str]:
        """Make what of a slide's features and page is not current; the report's status and message."""
        folder = self.folder / record.slide_id
        path, page = folder / "cells.h5", folder / "cells.html"
        encoder_id, source = encoder_hash(self.encoder), str(getattr(self.encoder, "source", ""))  # type: ignore[arg-type]
        if is_current(path, record.path, asked, encoder_id, "float32"):
            stored = read_features(path)
            features, fields = stored.features, stored_instances(asked, stored.coords)
            if page.is_file():
                return "current", in_words(fields, kind="cells")
        else:
            page.unlink(missing_ok=True)  # a page stands for the features beside it: a kill must not leave another's
            features, fields = embed_to_file(
                path,
                record,
                asked,
                self.encoder,
                encoder_id=encoder_id,
                encoder_name=Path(source).stem,
                batch_size=self.batch_size,
                device=self.device,
                dtype="float32",
                amp=False,
                num_threads=1,
            )
        with open_slide(record.path, mpp=record.mpp) as slide:
            pictures = np.asarray(slide.read_regions(fields.coords, fields.tile_size, mpp=fields.mpp))
        write_cells_page(page, record.slide_id, pictures, features, fields, Path(source).name)
        return "done", in_words(fields, kind="cells")
