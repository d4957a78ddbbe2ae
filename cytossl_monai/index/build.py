"""From slides to tile indexes: tiles are proposed where cells lie and kept where nuclei are."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cytossl_monai.data.slide_table import SlideRecord, read_slide_table
from cytossl_monai.data.slides.cache import SlideCache
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.data.tiles.index_file import COLUMNS, VERSION, TileIndex
from cytossl_monai.data.tiles.nuclei_file import NucleusTable, nuclei_path
from cytossl_monai.index.damage import find_unreadable, why_empty
from cytossl_monai.index.low_power import Grid, look_at_low_power
from cytossl_monai.index.nuclei import NucleusRules, count_nuclei
from cytossl_monai.index.overview import draw_overview
from cytossl_monai.index.settings import IndexSettings
from cytossl_monai.utils.errors import TableError, failure
from cytossl_monai.utils.files import file_fingerprint
from cytossl_monai.utils.locks import LockedError, item_lock
from cytossl_monai.utils.parallel import Outcome, default_workers, run_parallel
from cytossl_monai.utils.report import RunReport
from cytossl_monai.utils.shard import ALL, Shard, choose_shard

__all__ = ["EmptySlideError", "IndexSettings", "SlideIndexer", "index_slide", "index_slides", "index_to_file"]
_Found = tuple[TileIndex, NucleusTable]


class EmptySlideError(TableError):
    """No tile of the slide is worth keeping."""


def index_slide(
    record: SlideRecord, settings: IndexSettings | None = None, num_threads: int = 1, device: str = "cpu"
) -> TileIndex:
    """Index one slide.

    Tiles lie on a grid from the slide's top-left corner. A look at low power proposes those with something dark enough
    for a nucleus that is no pen mark; there nuclei are counted at a moderate resolution, and tiles with nuclei in focus
    are kept.

    Args:
        record: the slide; its ``mpp`` overrides what the file says.
        settings: what to look for; None for the defaults.
        num_threads: threads within the slide.
        device: where to decode and to find nuclei, ``cpu`` or ``cuda``.

    Returns:
        the index; it may hold no tile.

    Raises:
        SlideError: when the slide cannot be read or its resolution is not known.
    """
    settings = settings or IndexSettings()
    with open_slide(record.path, mpp=record.mpp, device=device, local=record.local) as slide:
        return _index(record, slide, settings, num_threads)[0]


def _index(record: SlideRecord, slide: Slide, settings: IndexSettings, num_threads: int) -> _Found:
    grid = Grid.over(slide, max(1, round(settings.tile_size * settings.mpp / slide.mpp)))
    low = look_at_low_power(
        slide,
        grid,
        settings.search_mpp,
        settings.foreground_density,
        settings.nuclear_density,
        settings.ink,
        num_threads,
    )
    tile_um2 = (grid.size * slide.mpp) ** 2
    clear = low.ink <= settings.max_ink_fraction
    # What could not be seen at low power may hold cells: it is looked at in detail.
    worthy = clear & ((low.dark * tile_um2 >= settings.min_dark_um2) | low.unseen)
    unreadable = find_unreadable(
        slide, grid, worthy, settings.tile_size, settings.mpp, settings.max_unreadable, num_threads
    )
    proposed = worthy & ~unreadable
    rules = NucleusRules(settings.min_nucleus_um2, settings.min_contrast, settings.min_edge, settings.max_elongation)
    nuclei = count_nuclei(slide, grid, proposed, settings.nuclei_mpp, rules, num_threads)
    with_nuclei = proposed & (nuclei.count >= max(1, settings.min_nuclei))
    # Sharp is what the slide's own sharp tiles are: stains and scanners differ.
    reference = float(np.percentile(nuclei.sharpness[with_nuclei], 90)) if with_nuclei.any() else 1.0
    sharpness = nuclei.sharpness / max(reference, 1e-6)
    in_focus = with_nuclei & (sharpness >= settings.min_sharpness)
    kept = in_focus if settings.min_nuclei else in_focus | (clear & ~with_nuclei & (low.foreground > 0))
    rows, columns = np.nonzero(kept)
    table = pd.DataFrame(
        {
            "slide_id": record.slide_id,
            "x": columns * grid.size,
            "y": rows * grid.size,
            "size": grid.size,
            "level": slide.best_level(settings.mpp),
            "mpp": settings.mpp,
            "n_nuclei": nuclei.count[kept],
            "nuclei_fraction": nuclei.fraction[kept],
            "foreground_fraction": low.foreground[kept],
            "sharpness": sharpness[kept],
        },
        columns=list(COLUMNS),
    )
    status = record.path.stat()
    meta: dict[str, Any] = {
        **_identity(record, settings),
        "slide_size": status.st_size,
        "slide_mtime": status.st_mtime,
        "width": slide.width,
        "height": slide.height,
        "level0_mpp": slide.mpp,
        "backend": slide.backend,
        "bounds_offset": list(slide.bounds_offset),
        "grid": {"columns": grid.columns, "rows": grid.rows},
        "tiles": {
            "grid": grid.columns * grid.rows,
            "ink": int((~clear).sum()),
            "proposed": int(proposed.sum()),
            "unreadable": int(unreadable.sum()),
            "without_nuclei": int((proposed & ~with_nuclei).sum()),
            "out_of_focus": int((with_nuclei & ~in_focus).sum()),
            "kept": int(kept.sum()),
        },
        "nuclei": int(nuclei.count[kept].sum()),
    }
    return TileIndex(table, meta), NucleusTable(nuclei.table(kept), _identity(record, settings))


def _identity(record: SlideRecord, settings: IndexSettings) -> dict[str, Any]:
    """What an index must agree in to be still the right one."""
    return {
        "version": VERSION,
        "slide_id": record.slide_id,
        "slide_path": str(record.path),
        "table_mpp": record.mpp,
        "fingerprint": file_fingerprint(record.path),
        "settings": asdict(settings),
    }


def index_slides(
    records: Sequence[SlideRecord],
    output_dir: str | os.PathLike[str],
    settings: IndexSettings | None = None,
    num_workers: int | None = None,
    device: str = "cpu",
    overview: bool = True,
    progress: bool = True,
    shard: Shard = ALL,
    cache: SlideCache | None = None,
) -> RunReport:
    """Index many slides; what is there already, made from the same slide with the same settings, stays.

    Writes ``<slide_id>.parquet``, ``nuclei/<slide_id>.parquet`` and ``<slide_id>_overview.png`` of each slide, and
    ``report.csv``. A slide that fails is reported, the others go on. One without cells is ``empty``: no index.

    Args:
        records: the slides.
        output_dir: folder to write to.
        settings: what to look for; None for the defaults.
        num_workers: slides at once, each a process; threads within a single one. None: one a core; 0: this process.
        device: where to decode and to find nuclei, ``cpu`` or ``cuda``.
        overview: draw the pictures.
        progress: show a progress bar.
        shard: which of the slides to do; the report is then ``report.<i>-of-<n>.csv``.
        cache: copies slides ahead to a faster disk.

    Returns:
        the report, written as well.
    """
    settings = settings or IndexSettings()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    workers = default_workers() if num_workers is None else num_workers
    records = shard.select(records, lambda record: record.slide_id)
    report = RunReport("index", shard.claim(folder / "report.csv"))
    alone = len(records) == 1 or workers <= 1
    work = partial(
        index_to_file,
        folder=folder,
        settings=settings,
        num_threads=max(1, workers) if alone else 1,
        device=device,
        overview=overview,
        cache=cache,
    )

    def needed(record: SlideRecord) -> bool:
        return not _is_done(record, folder, settings, overview)

    outcomes: dict[str, Outcome[SlideRecord, tuple[Literal["done", "current"], str, float]]] = {}
    pending = list(records)
    with cache or contextlib.nullcontext():
        if cache is not None:
            cache.start(records, needed)
        for wait in (False, True):  # slides that another run is at come last
            workers_now = min(workers, 1) if alone else workers
            for outcome in run_parallel(partial(work, wait=wait), pending, workers_now, "index", progress):
                outcomes[outcome.item.slide_id] = outcome
                if cache is not None:
                    cache.release(outcome.item)  # a worker that was killed could not
            pending = [r for r in pending if isinstance(outcomes[r.slide_id].error, LockedError)]
            if not pending:
                break
    for record in records:
        outcome = outcomes[record.slide_id]
        if isinstance(outcome.error, EmptySlideError):
            report.add(record.slide_id, "empty", str(outcome.error))
        elif outcome.error is not None:
            report.add(record.slide_id, "failed", failure(outcome.error))
        else:
            report.add(record.slide_id, *outcome.unwrap())
    report.save()
    return report


def index_to_file(
    record: SlideRecord,
    folder: Path,
    settings: IndexSettings,
    num_threads: int,
    device: str,
    overview: bool,
    cache: SlideCache | None = None,
    wait: bool = True,
) -> tuple[Literal["done", "current"], str, float]:
    """Index one slide to ``<slide_id>.parquet`` in ``folder``, unless what is there is current.

    Args:
        record: the slide.
        folder: where to write.
        settings: what to look for.
        num_threads: threads within the slide.
        device: where to decode and to find nuclei.
        overview: draw ``<slide_id>_overview.png``.
        cache: where a copy of the slide may be.
        wait: wait for another run that is at this slide.

    Returns:
        ``done`` or ``current``, what was found, and the seconds it took.

    Raises:
        EmptySlideError: when no tile is worth keeping; no index is written then.
        LockedError: when another run is at this slide and ``wait`` is False.
        SlideError: when the slide cannot be read.
    """
    start = time.perf_counter()
    path = folder / f"{record.slide_id}.parquet"
    with item_lock(folder, f"{record.slide_id}.index", "indexing", wait):
        if _is_done(record, folder, settings, overview):
            return "current", TileIndex.read(path).summary, time.perf_counter() - start
        near = record if cache is None else cache.get(record)
        with open_slide(record.path, mpp=record.mpp, device=device, local=near.local) as slide:
            index, nuclei = _index(record, slide, settings, num_threads)
            if overview:
                draw_overview(folder / f"{record.slide_id}_overview.png", slide, index)
        if not len(index):
            nuclei_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)  # of another slide or other settings: it would be taken for this one's
            raise EmptySlideError(why_empty(record, index))
        # A kill in between must leave neither an index without its nuclei nor one beside those of other settings.
        path.unlink(missing_ok=True)
        nuclei.write(nuclei_path(path))
        index.write(path)
    return "done", index.summary, time.perf_counter() - start


def _is_done(record: SlideRecord, folder: Path, settings: IndexSettings, overview: bool) -> bool:
    drawn = not overview or (folder / f"{record.slide_id}_overview.png").is_file()
    return drawn and _is_current(folder / f"{record.slide_id}.parquet", record, settings)


def _is_current(path: Path, record: SlideRecord, settings: IndexSettings) -> bool:
    if not path.is_file() or not nuclei_path(path).is_file() or not record.path.exists():
        return False  # an index of before has no nuclei: it is made again
    try:
        facts = TileIndex.read_meta(path), NucleusTable.read_meta(nuclei_path(path))
    except TableError:
        return False  # damaged: it is made again
    identity = _identity(record, settings)
    # Both: a run that was killed may have left nuclei that were found with other settings beside this index.
    return all(meta.get(key) == value for meta in facts for key, value in identity.items())


class SlideIndexer:
    """What the configuration ``index.json`` runs: a slide table in, tile indexes out.

    Args:
        slides: slide table or datalist.
        output_dir: folder to write to.
        settings: fields of ``IndexSettings``; ``ink`` may be a mapping of ``InkRules``' fields.
        num_workers: as for ``index_slides``.
        device: as for ``index_slides``.
        overview: as for ``index_slides``.
        progress: as for ``index_slides``.
        shard: ``"i/n"``; None looks for an array job, see `choose_shard`.
        cache: as for ``index_slides``.
    """

    def __init__(
        self,
        slides: str | os.PathLike[str],
        output_dir: str | os.PathLike[str],
        settings: dict[str, Any] | None = None,
        num_workers: int | None = None,
        device: str = "cpu",
        overview: bool = True,
        progress: bool = True,
        shard: str | None = None,
        cache: SlideCache | None = None,
    ) -> None:
        self.settings = IndexSettings.of(settings or {})
        self.slides, self.output_dir = Path(slides), Path(output_dir)
        self.num_workers, self.device, self.overview, self.progress = num_workers, device, overview, progress
        self.shard, self.cache = choose_shard(shard), cache

    def run(self) -> RunReport:
        """Index the slides and print the summary.

        Raises:
            TableError: when the slide table is malformed.
        """
        records = read_slide_table(self.slides)
        report = index_slides(
            records,
            self.output_dir,
            self.settings,
            self.num_workers,
            self.device,
            self.overview,
            self.progress,
            self.shard,
            self.cache,
        )
        print(report.summary(), flush=True)
        return report
