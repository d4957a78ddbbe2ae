"""What inference reads: one slide, a table of slides or a folder of them, each with its tile index."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Transform

from cytossl_monai.data.slide_table import SlideRecord, id_of_file, read_slide_table
from cytossl_monai.data.slides.cache import SlideCache
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.data.tiles.nuclei_file import nuclei_path
from cytossl_monai.index.build import EmptySlideError, IndexSettings, index_to_file
from cytossl_monai.index.fields import NucleusFields, nucleus_fields
from cytossl_monai.utils.errors import SettingError, TableError, failure
from cytossl_monai.utils.files import file_fingerprint
from cytossl_monai.utils.parallel import default_workers, run_parallel
from cytossl_monai.utils.shard import ALL, Shard

__all__ = ["SUFFIXES", "IndexSlided", "slide_items", "slide_records"]

SUFFIXES = (
    ".svs", ".tif", ".tiff", ".btf", ".qptiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi",
    ".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".bmp",
)  # fmt: skip
"""What counts as a slide where a folder is given; anything that opens is taken where a path is given."""

_MAX_NAMED = 10
_NO_IMAGES = (".csv", ".json", ".txt", ".md", ".xml", ".html", ".log", ".parquet", ".h5", ".geojson")
"""What lies beside slides and nobody expects to be read."""

logger = logging.getLogger(__name__)


def slide_records(
    slide: str | os.PathLike[str] | None = None,
    slides: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    mpp: float | None = None,
) -> list[SlideRecord]:
    """The slides to infer; exactly one of the first three arguments says which.

    Args:
        slide: path of one slide; its name without the suffix becomes its slide_id.
        slides: slide table (CSV) or MONAI datalist.
        folder: folder whose slides are all taken (not those of folders within it).
        mpp: micrometres per pixel at level 0, for ``slide`` and ``folder`` where the files do not say.

    Raises:
        TableError: when none or several are given, when the table is malformed, or when the folder holds no slide.
    """
    sources = {"slide": slide, "slides": slides, "dataset_dir": folder}
    named = [name for name, value in sources.items() if value is not None]
    if len(named) != 1:
        raise TableError(
            "give one of --slide (a slide), --slides (a table of slides) and --dataset_dir (a folder of slides)"
            + (f", not {' and '.join(named)}" if named else "")
        )
    if slides is not None:
        return read_slide_table(slides)
    if slide is not None:
        paths = [Path(slide)]
    else:
        root = Path(str(folder))
        if not root.is_dir():
            raise TableError(f"the folder of slides {root} does not exist; give another dataset_dir")
        files = sorted(p for p in root.iterdir() if p.is_file() and not p.name.startswith("."))
        paths = [p for p in files if p.suffix.lower() in SUFFIXES]
        others = [p.name for p in files if p.suffix.lower() not in (*SUFFIXES, *_NO_IMAGES)]
        if others:
            logger.warning(
                "%d files in %s are passed over, their suffix is that of no slide: %s; give a slide table to try them",
                len(others),
                root,
                ", ".join(others[:_MAX_NAMED]) + (" and others" if len(others) > _MAX_NAMED else ""),
            )
        if not paths:
            raise TableError(f"the folder {root} holds no slide ({', '.join(SUFFIXES)}); give another dataset_dir")
    records: dict[str, SlideRecord] = {}
    for path in paths:
        slide_id = id_of_file(path)
        if slide_id.casefold() in records:
            raise TableError(
                f"{path} and {records[slide_id.casefold()].path} would both be named {slide_id}; give a slide table"
            )
        records[slide_id.casefold()] = SlideRecord(slide_id, path.expanduser().absolute(), None, slide_id, mpp=mpp)
    return list(records.values())


def slide_items(
    slide: str | os.PathLike[str] | None = None,
    slides: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    mpp: float | None = None,
    shard: Shard = ALL,
) -> list[dict[str, Any]]:
    """``slide_records`` as MONAI items: ``slide_id``, ``image`` (path as text), ``record``; those of ``shard`` only."""
    return [
        {"slide_id": record.slide_id, "image": str(record.path), "record": record}
        for record in shard.select(slide_records(slide, slides, folder, mpp), lambda record: record.slide_id)
    ]


class IndexSlided(Transform):
    """Give a slide's item its tiles, from the index that is there already or from a new one.

    Adds ``index`` (`TileIndex`), ``index_path`` and ``index_seconds``. A slide that cannot be indexed does not raise:
    its item gets ``problem``, the pair (``"failed"`` or ``"empty"``, why), so that the slides after it go on. A new
    index is made in a process of its own: a library that crashes on a damaged file takes only that process with it.

    Args:
        index_dir: folder of the indexes, ``<slide_id>.parquet``.
        tile_size: side of a tile in pixels at ``mpp``.
        mpp: micrometres per pixel that tiles are read at.
        settings: other fields of `IndexSettings`. None takes any index of this very slide with tiles of this size
            and resolution, whatever thresholds it was made with, and makes a missing one with the defaults.
        num_threads: threads within the slide; None takes one for each CPU core.
        device: where to decode and to find nuclei.
        cache: gives copies of slides on a faster disk; who starts it is `SlideEvaluator`.
        fields: None gives the tiles of the index, else fields centred on its nuclei.
        isolate: False indexes in this process, for callers that must not start others (a MONAI Deploy application).
    """

    def __init__(
        self,
        index_dir: str | os.PathLike[str],
        tile_size: int = 224,
        mpp: float = 0.5,
        settings: Mapping[str, Any] | None = None,
        num_threads: int | None = None,
        device: str | torch.device = "cpu",
        isolate: bool = True,
        cache: SlideCache | None = None,
        fields: NucleusFields | None = None,
    ) -> None:
        try:
            self.settings = IndexSettings.of({"tile_size": tile_size, "mpp": mpp, **(settings or {})})
        except SettingError as error:
            raise SettingError(f"index_settings: {error}") from error
        self.index_dir, self.any_thresholds = Path(index_dir), settings is None
        self.num_threads, self.device = num_threads, str(torch.device(device).type)
        self.isolate, self.cache, self.fields = isolate, cache, fields
        self._calls = 0

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Index one slide.

        Args:
            data: item with ``record``.

        Returns:
            the item with ``index`` or ``problem``.
        """
        item, start = dict(data), time.perf_counter()
        record = item["record"] = data["record"] if self.cache is None else self.cache.get(data["record"])
        path = self.index_dir / f"{record.slide_id}.parquet"
        try:
            index = self._present(path, record) or self._made(path, record)
            item["index"] = nucleus_fields(index, path, self.fields)
            item["index_path"] = str(path)
        except EmptySlideError as error:
            item["problem"] = ("empty", str(error))
        except Exception as error:  # noqa: BLE001 - every failure of a slide is its own, whatever it is
            item["problem"] = ("failed", failure(error))
        item["index_seconds"] = time.perf_counter() - start
        return item

    def _present(self, path: Path, record: SlideRecord) -> TileIndex | None:
        if not self.any_thresholds or not path.is_file() or not record.path.exists():
            return None
        if self.fields is not None and not nuclei_path(path).is_file():
            return None  # of an older version: it is made again, with its nuclei
        try:
            index = TileIndex.read(path)
        except TableError:
            return None  # damaged: it is made again
        same = index.meta.get("fingerprint") == file_fingerprint(record.path) and len(index) > 0
        same &= (index.tile_size, index.mpp) == (self.settings.tile_size, self.settings.mpp)
        same &= index.meta.get("table_mpp") == record.mpp
        return index if same else None

    def _made(self, path: Path, record: SlideRecord) -> TileIndex:
        self.index_dir.mkdir(parents=True, exist_ok=True)
        threads = self.num_threads or default_workers()
        # The first slide is indexed while nothing else happens; later ones while the encoder works, whose threads must
        # not be forked.
        first, self._calls = self._calls == 0, self._calls + 1
        if not first and self.num_threads is None:
            threads = max(1, threads // 2)
        work = partial(
            index_to_file,
            folder=self.index_dir,
            settings=self.settings,
            num_threads=threads,
            device=self.device,
            overview=False,
        )
        method = None
        if not first and "forkserver" in multiprocessing.get_all_start_methods():
            # The server imports once what its children need; set before it starts, this costs nothing later.
            method = "forkserver"
            multiprocessing.get_context(method).set_forkserver_preload(["cytossl_monai.index.build"])
        for outcome in run_parallel(work, [record], int(self.isolate), progress=False, start_method=method):
            outcome.unwrap()
        return TileIndex.read(path)
