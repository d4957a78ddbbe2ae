"""Tiles straight from slides, through the tile index: nothing is cut to disk first."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from cytossl_monai.data.slides.pool import SlidePool
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.data.tiles.outlines import KnownNuclei
from cytossl_monai.utils.errors import InputError, SlideError, TableError
from cytossl_monai.utils.files import file_fingerprint, visible_files

__all__ = ["MixedDataset", "TileDataset", "collate_tiles"]

logger = logging.getLogger(__name__)
Item = dict[str, Any]
Key = int | tuple[int, int]


def split_keys(keys: Sequence[Key]) -> tuple[np.ndarray, np.ndarray]:
    """Item numbers and sample numbers of what a sampler asks for; a bare item number is its own sample number."""
    pairs = [key if isinstance(key, tuple) else (int(key), int(key)) for key in keys]
    numbers = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return numbers[:, 0], numbers[:, 1]


def apply_transform(transform: Callable[[Item], Item] | None, items: list[Item]) -> list[Item]:
    """Apply a transform to each item; a random MONAI transform is seeded by the item's sample number.

    A worker process would otherwise draw from a state that depends on when it was started, and a resumed run would see
    other pixels than the uninterrupted one.
    """
    if transform is None:
        return items
    done = []
    for item in items:
        if hasattr(transform, "set_random_state"):
            transform.set_random_state(seed=int(item["sample"]) % (2**32))
        done.append(transform(item))
    return done


def collate_tiles(items: Sequence[Item]) -> dict[str, Any]:
    """Stack items to a batch: ``image`` uint8 (B, 3, H, W), ``mpp`` float32 (B,), ``sample`` int64 (B,), ...

    Strings stay lists. Other than MONAI's collation it carries no metadata and costs one copy.
    """
    return dict(default_collate(list(items)))


class TileDataset(Dataset[Item]):
    """A map-style data set over the tiles of all index files of a folder.

    ``__getitems__`` reads a whole batch in one batched call a slide, which PyTorch's loader uses by itself. Slides are
    opened in the process that reads, at most ``max_open`` at a time.

    An item is a dictionary: ``image`` uint8 (3, size, size), ``mpp`` float32, ``valid`` float32 (left, top, right,
    bottom) of the real pixels in it, here all, ``slide_id``, ``x``, ``y`` (level-0
    pixels), ``sample`` (the sampler's number for this draw, or the item's own).

    Args:
        index: folder of ``<slide_id>.parquet`` files, or a list of such files.
        size: side of a tile in pixels; default: as indexed.
        mpp: micrometres per pixel to read at; default: as indexed. The tile keeps its centre.
        transform: applied to each item in the worker.
        slide_ids: use only these; default: all.
        slide_root: where the slides lie now, if they have been moved since indexing: looked up by the end of their
            path, with as many folders as are still there, at least by file name.
        weight_column: column of the index that says how much a tile is wanted; None: all alike.
        weight_power: a tile's weight is ``(1 + column) ** weight_power``.
        min_nuclei: leave out tiles with fewer nuclei.
        backend: slide reader, see ``open_slide``.
        max_open: open slides a process.
        nuclei: those of a detector, as :func:`cytossl_monai.index.detected_nuclei` gives them: an item then has
            ``nuclei``, an instance map int16 (1, size, size), and nobody looks for nuclei in it. None: has none.
        on_missing: ``"skip"`` leaves a slide out whose file is gone or has changed since it was indexed, and says so;
            ``"raise"`` stops.

    Raises:
        TableError: when the folder holds no index, a name in ``slide_ids`` is unknown, or no tile is left.
        SlideError: when a slide is gone and ``on_missing`` is ``"raise"``; while reading, when a tile cannot be read.
    """

    def __init__(
        self,
        index: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        size: int | None = None,
        mpp: float | None = None,
        transform: Callable[[Item], Item] | None = None,
        slide_ids: Sequence[str] | None = None,
        slide_root: str | os.PathLike[str] | None = None,
        weight_column: str | None = "n_nuclei",
        weight_power: float = 0.5,
        min_nuclei: int = 0,
        backend: str = "auto",
        max_open: int = 16,
        on_missing: str = "skip",
        nuclei: KnownNuclei | None = None,
    ) -> None:
        self.nuclei = nuclei
        if on_missing not in ("skip", "raise"):
            raise ValueError(f"on_missing must be 'skip' or 'raise', got {on_missing!r}")
        self.transform = transform
        self.slide_ids: list[str] = []
        self.slide_paths: list[Path] = []
        self.skipped: dict[str, str] = {}
        self._level0_mpp: list[float] = []
        parts: dict[str, list[np.ndarray]] = {"group": [], "x": [], "y": [], "mpp": [], "size": [], "weight": []}
        for table in self._select(_index_files(index), slide_ids):
            path = table.slide_path if slide_root is None else _moved(Path(slide_root), table.slide_path)
            message = _unfit(table, path)
            if message is None and nuclei is not None and nuclei.why_not(table.slide_id) is not None:
                message = f"slide {table.slide_id}: {nuclei.why_not(table.slide_id)}"
            if message is None and path in self.slide_paths:
                twin = self.slide_ids[self.slide_paths.index(path)]
                raise TableError(
                    f"{path} would be both slide {twin} and slide {table.slide_id}: below slide_root keep the folders "
                    "that tell files of one name apart"
                )
            if message is not None:
                if on_missing == "raise":
                    raise SlideError(message)
                logger.error("left out: %s", message)
                self.skipped[table.slide_id] = message
                continue
            rows = table.table
            if min_nuclei > 0:
                rows = rows[rows["n_nuclei"] >= min_nuclei]
            if rows.empty:
                self.skipped[table.slide_id] = "no tile left"
                logger.warning("left out: slide %s has no tile to train on", table.slide_id)
                continue
            self._add(parts, table, rows, path, size, mpp, weight_column, weight_power)
        if not self.slide_ids:
            raise TableError(f"no tile to train on in {index}: {len(self.skipped)} slides left out; index slides first")
        joined = {name: np.concatenate(values) for name, values in parts.items()}
        self.groups: np.ndarray = joined["group"]
        self.weights: np.ndarray | None = joined["weight"] if weight_column is not None else None
        self._xy = np.stack([joined["x"], joined["y"]], axis=1)
        self._mpp, self._size = joined["mpp"], joined["size"]
        # Safe across forks and pickles: a worker's copy starts empty.
        self.pool = SlidePool(max_open=max_open, backend=backend)

    @staticmethod
    def _select(files: Sequence[Path], slide_ids: Sequence[str] | None) -> list[TileIndex]:
        tables = []
        for file in files:
            # A name is checked before the rows are read: a folder may hold thousands of slides.
            if slide_ids is None or str(TileIndex.read_meta(file)["slide_id"]) in slide_ids:
                tables.append(TileIndex.read(file))
        unknown = set(slide_ids or ()) - {table.slide_id for table in tables}
        if unknown:
            raise TableError(f"no tile index for the slides {', '.join(sorted(unknown))}; index them first")
        return tables

    def _add(
        self,
        parts: dict[str, list[np.ndarray]],
        table: TileIndex,
        rows: Any,
        path: Path,
        size: int | None,
        mpp: float | None,
        weight_column: str | None,
        weight_power: float,
    ) -> None:
        """Append one slide's tiles; a tile read at another size or scale keeps its centre."""
        if weight_column is not None and weight_column not in rows.columns:
            raise TableError(f"the tile index of {table.slide_id} has no column {weight_column!r} to weight tiles by")
        n = len(rows)
        target_mpp = rows["mpp"].to_numpy(np.float64) if mpp is None else np.full(n, mpp, dtype=np.float64)
        pixels = table.tile_size if size is None else size
        indexed = rows["size"].to_numpy(np.float64)
        wanted = pixels * target_mpp / table.level0_mpp
        shift = np.where(np.abs(wanted - indexed) >= 1.0, (indexed - wanted) / 2, 0.0)
        parts["group"].append(np.full(n, len(self.slide_ids), dtype=np.int32))
        parts["x"].append(np.round(rows["x"].to_numpy(np.float64) + shift).astype(np.int64))
        parts["y"].append(np.round(rows["y"].to_numpy(np.float64) + shift).astype(np.int64))
        parts["mpp"].append(target_mpp)
        parts["size"].append(np.full(n, pixels, dtype=np.int32))
        weight = np.ones(n) if weight_column is None else np.power(1.0 + rows[weight_column].to_numpy(), weight_power)
        parts["weight"].append(weight.astype(np.float64))
        self.slide_ids.append(table.slide_id)
        self.slide_paths.append(path)
        self._level0_mpp.append(table.level0_mpp)

    @property
    def tile(self) -> tuple[int, float] | None:
        """Side in pixels and micrometres per pixel of the tiles, where all are alike."""
        kinds = np.unique(np.stack([self._size.astype(np.float64), self._mpp], axis=1), axis=0)
        return (int(kinds[0, 0]), float(kinds[0, 1])) if len(kinds) == 1 else None

    def __len__(self) -> int:
        return len(self.groups)

    def tile_um(self) -> float:
        """Side of a tile in um, the median of the tiles."""
        return float(np.median(self._size * self._mpp))

    def _read_group(self, group: int, items: np.ndarray) -> np.ndarray:
        """(n, 3, size, size) uint8: tiles of one slide, of one size and scale."""
        size, mpp = int(self._size[items[0]]), float(self._mpp[items[0]])
        slide = self.pool.get(self.slide_paths[group], mpp=self._level0_mpp[group])
        return np.asarray(slide.read_regions(self._xy[items], size, mpp=mpp))

    def __getitems__(self, keys: Sequence[Key]) -> list[Item]:
        """Read many tiles, in as few batched calls as there are slides (and scales) among them."""
        numbers, samples = split_keys(keys)
        images: list[np.ndarray | None] = [None] * len(numbers)
        calls: dict[Hashable, list[int]] = {}
        for slot, item in enumerate(numbers):
            calls.setdefault((self.groups[item], self._size[item], self._mpp[item]), []).append(slot)
        for slots in calls.values():
            group = int(self.groups[numbers[slots[0]]])
            try:
                tiles = self._read_group(group, numbers[slots])
            except InputError as error:
                raise SlideError(f"while training, slide {self.slide_ids[group]}: {error}") from error
            for slot, tile in zip(slots, tiles):
                images[slot] = tile
        items = [self._item(int(n), int(s), image) for n, s, image in zip(numbers, samples, images)]
        return apply_transform(self.transform, items)

    def _item(self, number: int, sample: int, image: np.ndarray | None) -> Item:
        assert image is not None
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        return {"image": pixels, "mpp": np.float32(self._mpp[number]), **self.about(number, sample)}

    def about(self, number: int, sample: int) -> Item:
        """What an item says beside its pixels and their scale: ``valid``, ``slide_id``, ``x``, ``y``, ``sample``.

        And, where the nuclei are known, ``nuclei``.
        """
        x, y = self._xy[number]
        group = int(self.groups[number])
        slide_id = self.slide_ids[group]
        side = float(self._size[number])
        valid = torch.tensor([0.0, 0.0, side, side])
        item = {"valid": valid, "slide_id": slide_id, "x": int(x), "y": int(y), "sample": sample}
        if self.nuclei is None:
            return item
        pixels = int(self._size[number])
        level0 = pixels * float(self._mpp[number]) / self._level0_mpp[group]
        return {**item, "nuclei": torch.from_numpy(self.nuclei.of(slide_id).draw(x, y, level0, pixels))}

    @property
    def knows_nuclei(self) -> bool:
        """Whether items bring their nuclei."""
        return self.nuclei is not None

    def cache_key(self) -> dict[str, Any]:
        """What the pixels of the items depend on, for `TileCache`: files, arrays and settings."""
        arrays = [self.groups, self._xy, self._mpp, self._size, np.asarray(self._level0_mpp)]
        return {"files": self.slide_paths, "arrays": arrays, "settings": {"backend": self.pool.backend}}

    def __getitem__(self, key: Key) -> Item:
        return self.__getitems__([key])[0]


class MixedDataset(Dataset[Item]):
    """Several data sets as one, with the share of every batch that each gets.

    Args:
        sources: data sets with ``groups`` and ``weights`` (``TileDataset``, ``ImageFolder``). Each must give images of
            the same size.
        shares: how much of a batch each source gets, relative to the others; default: all alike.
        transform: applied to each item after the source's own.

    Raises:
        ValueError: when there is no source, or ``shares`` does not fit them.
    """

    KEYS = ("image", "mpp", "valid", "slide_id", "x", "y", "sample")

    def __init__(
        self,
        sources: Sequence[Any],
        shares: Sequence[float] | None = None,
        transform: Callable[[Item], Item] | None = None,
    ) -> None:
        if not sources:
            raise ValueError("MixedDataset needs at least one source")
        self.sources = list(sources)
        self.shares = [1.0] * len(self.sources) if shares is None else [float(share) for share in shares]
        if len(self.shares) != len(self.sources) or min(self.shares) <= 0:
            raise ValueError(f"shares must be {len(self.sources)} numbers above zero, got {shares}")
        knowing = [bool(getattr(source, "knows_nuclei", False)) for source in self.sources]
        if any(knowing) and not all(knowing):
            raise ValueError("nuclei are known of some sources and not of others; give them for all, or for none")
        self.knows_nuclei = all(knowing)
        self.keys = (*self.KEYS, "nuclei") if self.knows_nuclei else self.KEYS
        self.transform = transform
        ends = np.cumsum([len(source) for source in self.sources])
        self.offsets = np.concatenate([[0], ends[:-1]])
        self._ends = ends
        starts = np.cumsum([0] + [int(source.groups.max()) + 1 for source in self.sources])
        self.groups = np.concatenate([s.groups.astype(np.int64) + start for s, start in zip(self.sources, starts)])
        self.weights: np.ndarray | None = None

    @property
    def tile(self) -> tuple[int, float] | None:
        """As `TileDataset.tile`, where the sources are alike (to a hundredth of the scale)."""
        tiles = [getattr(source, "tile", None) for source in self.sources]
        first = tiles[0]
        if first is None or any(t is None or t[0] != first[0] or abs(t[1] - first[1]) > 0.01 * first[1] for t in tiles):
            return None
        return first

    def tile_um(self) -> float:
        """Side of an item in um: that of the source with the largest share."""
        return float(self.sources[int(np.argmax(self.shares))].tile_um())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitems__(self, keys: Sequence[Key]) -> list[Item]:
        """Read many items, asking each source once."""
        numbers, samples = split_keys(keys)
        owner = np.searchsorted(self._ends, numbers, side="right")
        items: list[Item | None] = [None] * len(numbers)
        for i in np.unique(owner):
            slots = np.flatnonzero(owner == i)
            wanted = [(int(numbers[s] - self.offsets[i]), int(samples[s])) for s in slots]
            for slot, item in zip(slots, self.sources[i].__getitems__(wanted)):
                # Sources may carry further keys (labels); a batch needs the same ones throughout.
                items[int(slot)] = {key: item[key] for key in self.keys}
        return apply_transform(self.transform, [item for item in items if item is not None])

    def about(self, number: int, sample: int) -> Item:
        """As `TileDataset.about`, of the source that the item is from."""
        owner = int(np.searchsorted(self._ends, number, side="right"))
        item: Item = self.sources[owner].about(int(number - self.offsets[owner]), sample)
        return item

    def __getitem__(self, key: Key) -> Item:
        return self.__getitems__([key])[0]


def _moved(root: Path, path: Path) -> Path:
    """Where a slide lies below ``root``: by the longest end of its old path that there is."""
    for start in range(1, len(path.parts)):
        place = root.joinpath(*path.parts[start:])
        if place.exists():
            return place
    return root / path.name


def _unfit(table: TileIndex, path: Path) -> str | None:
    """Why a slide cannot be trained on, None where it can: gone, or not the file that was indexed."""
    if not path.exists():
        return f"slide {table.slide_id}: {path} is gone; put it back or give slide_root"
    status, facts = path.stat(), table.meta
    # A file of the same size and time is not read for its fingerprint: a cohort has thousands.
    if (status.st_size, status.st_mtime) == (facts.get("slide_size"), facts.get("slide_mtime")):
        return None
    if facts.get("fingerprint") in (None, file_fingerprint(path)):
        return None
    return f"slide {table.slide_id}: {path} has changed since it was indexed; index it again"


def _index_files(index: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The index files of a folder, sorted by name, or the files given."""
    if isinstance(index, str | os.PathLike):
        folder = Path(index)
        if folder.is_file():
            return [folder]
        files = visible_files(folder, "*.parquet") if folder.is_dir() else []
        if not files:
            raise TableError(f"no tile index (*.parquet) in {folder}; run the bundle's index.json first")
        return files
    return [Path(file) for file in index]


def batch_to(batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False) -> dict[str, Any]:
    """Move a batch's tensors to a device; the rest stays."""
    return {k: v.to(device, non_blocking=non_blocking) if torch.is_tensor(v) else v for k, v in batch.items()}
