"""A slide's cells on a page that finds look-alikes: fields centred on nuclei, embedded, nothing trained."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import nn

from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.inference.embed import embed_to_file
from cytossl_monai.inference.encoder import require_trained_encoder
from cytossl_monai.inference.slides import IndexSlided
from cytossl_monai.networks.nets.encoder import encoder_hash
from cytossl_monai.transforms.nuclei.mask import nuclei_mask
from cytossl_monai.utils.errors import TableError, failure
from cytossl_monai.utils.report import RunReport
from cytossl_monai.visualize.cells_page import write_cells_page

__all__ = ["CellBrowser", "cell_fields"]

logger = logging.getLogger(__name__)
_READ_UM = 110.0  # side of what is read at once to look for nuclei
_AREA_UM2 = (15.0, 700.0)  # of a nucleus, or of some that touch
_BATCH = 16


def cell_fields(
    slide: Slide,
    index: TileIndex,
    tile_size: int,
    mpp: float,
    max_cells: int = 1000,
    seed: int = 0,
) -> TileIndex:
    """Fields of equal size centred on a slide's nuclei, as a tile index of their own.

    Tiles of ``index`` are drawn at random, those with more nuclei sooner, until they have given enough cells: the work
    is bounded, however large the slide.

    Args:
        slide: the open slide.
        index: its tiles where nuclei are.
        tile_size: side of a field in pixels.
        mpp: micrometres per pixel of a field.
        max_cells: the most fields.
        seed: of the draw.

    Returns:
        the fields, ordered by row and column of the slide.

    Raises:
        TableError: where no nucleus is found.
    """
    rng = np.random.default_rng(seed)
    weights = 1.0 + index.table["n_nuclei"].to_numpy(np.float64)
    order = np.argsort(rng.exponential(size=len(index)) / weights)
    table = index.table.iloc[order]
    centres_of = table[["x", "y"]].to_numpy(np.float64) + table["size"].to_numpy(np.float64)[:, None] / 2
    side = max(tile_size, round(min(_READ_UM, float(table["size"].max()) * slide.mpp) / mpp))
    scale = mpp / slide.mpp
    found: list[np.ndarray] = []
    for start in range(0, len(centres_of), _BATCH):
        corners = np.round(centres_of[start : start + _BATCH] - side * scale / 2).astype(np.int64)
        images = torch.from_numpy(np.ascontiguousarray(slide.read_regions(corners, side, mpp=mpp)))
        masks = nuclei_mask(images, torch.full((len(images),), mpp))[:, 0].cpu().numpy()
        for corner, mask in zip(corners, masks, strict=True):
            found.append(corner + scale * _centres(mask, mpp))
        if sum(map(len, found)) >= max_cells:
            break
    centres = _apart(np.concatenate(found)[:max_cells] if found else np.zeros((0, 2)), 4.0 / slide.mpp)
    if len(centres) == 0:
        raise TableError(
            f"slide {index.slide_id}: no nucleus was found in {len(index)} tiles; index it with other rules"
        )
    centres = centres[np.lexsort((centres[:, 0], np.floor(centres[:, 1] / (side * scale))))]
    corners = np.round(centres - tile_size * scale / 2).astype(np.int64)
    fields = pd.DataFrame({"x": corners[:, 0], "y": corners[:, 1]})
    fields["slide_id"], fields["size"] = index.slide_id, round(tile_size * scale)
    fields["level"], fields["mpp"], fields["n_nuclei"] = 0, mpp, 1
    fields["nuclei_fraction"] = fields["foreground_fraction"] = fields["sharpness"] = np.float32(1.0)
    settings = {**index.meta["settings"], "tile_size": tile_size, "mpp": mpp, "max_cells": max_cells, "seed": seed}
    return TileIndex(fields, {**index.meta, "settings": settings})


def _centres(mask: np.ndarray, mpp: float) -> np.ndarray:
    """(n, 2) x, y in pixels of the nuclei of one image that do not touch its border."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return np.zeros((0, 2))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:] * mpp**2
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    fits = (areas >= _AREA_UM2[0]) & (areas <= _AREA_UM2[1]) & ~np.isin(np.arange(1, count + 1), border)
    middle = ndimage.center_of_mass(mask, labels, np.arange(1, count + 1)[fits])
    return np.asarray(middle, dtype=np.float64).reshape(-1, 2)[:, ::-1]


def _apart(centres: np.ndarray, distance: float) -> np.ndarray:
    """Centres without repetitions: tiles that overlap see a nucleus twice."""
    if len(centres) == 0:
        return centres
    first = np.unique(np.floor(centres / distance).astype(np.int64), axis=0, return_index=True)[1]
    return centres[np.sort(first)]


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
        self.tile_size, self.mpp, self.max_cells, self.seed = tile_size, mpp, max_cells, seed
        self.batch_size, self.device = batch_size, device
        self.index = IndexSlided(self.folder / "cache" / "index", num_threads=num_threads, device=device)

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

    def _browse(self, record: SlideRecord, index: TileIndex) -> int:
        with open_slide(record.path, mpp=record.mpp) as slide:
            fields = cell_fields(slide, index, self.tile_size, self.mpp, self.max_cells, self.seed)
            pictures = np.asarray(slide.read_regions(fields.coords, self.tile_size, mpp=self.mpp))
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
