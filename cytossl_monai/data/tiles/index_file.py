"""The tile index: which tiles of a slide are worth looking at, as one Parquet file a slide."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cytossl_monai.utils.errors import TableError
from cytossl_monai.utils.files import atomic_path

__all__ = ["COLUMNS", "VERSION", "TileIndex"]

VERSION = 1
COLUMNS: dict[str, str] = {
    "slide_id": "str",
    "x": "int64",
    "y": "int64",
    "size": "int64",
    "level": "int64",
    "mpp": "float64",
    "n_nuclei": "int64",
    "nuclei_fraction": "float32",
    "foreground_fraction": "float32",
    "sharpness": "float32",
}
"""Columns and their types.

``x, y``: column and row of the tile's top-left corner, level-0 pixels. ``size``: its side in level-0 pixels. ``level``:
the slide's level that it is read from. ``mpp``: micrometres per pixel that it is to be read at. ``n_nuclei``: nuclei
whose centre lies in the tile. ``nuclei_fraction``, ``foreground_fraction``: share of its area, 0 to 1. ``sharpness``:
the slide's sharpest tiles have about 1.
"""
_MAX_MPP, _MAX_TILE = 1000.0, 1 << 16
_META_KEY = b"cytossl_tile_index"


class TileIndex:
    """The tiles of one slide and how they were found.

    Args:
        table: one row a tile with the columns of ``COLUMNS``; further columns are kept.
        meta: JSON-able facts: ``slide_id``, ``slide_path``, ``slide_size``, ``slide_mtime``, ``fingerprint``,
            ``width``, ``height``, ``level0_mpp``, ``settings``.

    Raises:
        TableError: when a column is missing or not of its type.
    """

    def __init__(self, table: pd.DataFrame, meta: Mapping[str, Any]) -> None:
        absent = [name for name in COLUMNS if name not in table.columns]
        if absent:
            raise TableError(f"tile index without the column {', '.join(absent)}; index the slide again")
        try:
            self.table = table.astype(COLUMNS).reset_index(drop=True)
        except (TypeError, ValueError) as error:
            raise TableError(f"tile index with a column of a wrong type ({error}); index the slide again") from error
        self.meta: dict[str, Any] = {"version": VERSION, **meta}

    def __len__(self) -> int:
        return len(self.table)

    @property
    def slide_id(self) -> str:
        """Name of the slide in the slide table."""
        return str(self.meta["slide_id"])

    @property
    def slide_path(self) -> Path:
        """The slide that was indexed."""
        return Path(self.meta["slide_path"])

    @property
    def level0_mpp(self) -> float:
        """Micrometres per level-0 pixel that the index was made with."""
        return float(self.meta["level0_mpp"])

    @property
    def summary(self) -> str:
        """One line: how many tiles and nuclei, and what was left out as damaged."""
        unreadable = int(self.meta.get("tiles", {}).get("unreadable", 0))
        damage = f"; {unreadable} damaged tiles left out" if unreadable else ""
        return f"{len(self)} tiles, {self.meta.get('nuclei', 0)} nuclei{damage}"

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels at ``mpp``."""
        return int(self.meta["settings"]["tile_size"])

    @property
    def mpp(self) -> float:
        """Micrometres per pixel that the tiles are to be read at."""
        return float(self.meta["settings"]["mpp"])

    @property
    def coords(self) -> np.ndarray:
        """(N, 2) int64: x, y of the tiles' top-left corners, level-0 pixels."""
        return self.table[["x", "y"]].to_numpy(dtype=np.int64)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the index as Parquet, atomically.

        Args:
            path: the file, ``<slide_id>.parquet`` by convention.

        Returns:
            the path written.
        """
        path = Path(path)
        arrow = pa.Table.from_pandas(self.table, preserve_index=False)
        facts = {key: value for key, value in self.meta.items() if key != "n_tiles"}  # the file knows its rows
        meta = json.dumps(facts, allow_nan=False, sort_keys=True).encode()
        arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), _META_KEY: meta})
        with atomic_path(path) as partial:
            pq.write_table(arrow, partial, compression="zstd")
        return path

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> TileIndex:
        """Read an index.

        Args:
            path: the Parquet file.

        Raises:
            TableError: when the file is missing, damaged, no tile index, or of a newer version.
        """
        path = Path(path)
        meta = cls.read_meta(path)
        try:
            index = cls(pq.read_table(path).to_pandas(), meta)
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"tile index {path} is damaged ({error}); delete it and index the slide again") from error
        except TableError as error:
            raise TableError(f"{path}: {error}") from error
        complaint = index.complaint()
        if complaint is not None:
            raise TableError(f"tile index {path} {complaint}; delete it and index the slide again")
        return index

    def complaint(self) -> str | None:
        """What of its numbers cannot be, to follow the file's name; None where all can."""
        table = self.table
        if not (0 < self.level0_mpp < _MAX_MPP and 0 < self.mpp < _MAX_MPP and 0 < self.tile_size < _MAX_TILE):
            return f"has tiles of {self.tile_size} pixels at {self.mpp} um of a slide at {self.level0_mpp}"
        if (table["size"] < 1).any() or not ((table["mpp"] > 0) & (table["mpp"] < _MAX_MPP)).all():
            return "has a size or a resolution that is not above 0"
        for start, side in (("x", "width"), ("y", "height")):
            if side in self.meta and not ((table[start] + table["size"] > 0) & (table[start] < self.meta[side])).all():
                return f"has tiles outside its slide, whose {side} is {self.meta[side]} pixels"
        return None

    @staticmethod
    def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
        """The index's facts, with ``n_tiles``, without reading its rows.

        Args:
            path: the Parquet file.

        Raises:
            TableError: as for ``read``.
        """
        path = Path(path)
        if not path.is_file():
            raise TableError(f"tile index {path} does not exist; index the slide first")
        try:
            found = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"tile index {path} is damaged ({error}); delete it and index the slide again") from error
        stored = (found.metadata or {}).get(_META_KEY)
        if stored is None:
            raise TableError(f"{path} is a Parquet file but no tile index; give the folder that index.json wrote")
        try:
            meta: dict[str, Any] = dict(json.loads(stored))
            version = int(meta.get("version", 0))
        except (ValueError, TypeError, RecursionError) as error:
            raise TableError(_unreadable(path, str(error))) from error
        if version > VERSION:
            raise TableError(
                f"tile index {path} is of version {version}, this program reads up to {VERSION}; "
                "update the program or index the slide again"
            )
        try:
            numbers = [meta["level0_mpp"], meta["settings"]["tile_size"], meta["settings"]["mpp"]]
            for value in (*numbers, *(meta[side] for side in ("width", "height") if side in meta)):
                if isinstance(value, bool) or not math.isfinite(float(value)):
                    raise ValueError(f"{value!r} is no number")
            if not isinstance(meta["slide_id"], str) or not isinstance(meta["slide_path"], str):
                raise ValueError("its slide has no name or no path")
        except (ValueError, KeyError, TypeError) as error:
            what = f"they lack {error}" if isinstance(error, KeyError) else str(error)
            raise TableError(_unreadable(path, what)) from error
        return {**meta, "n_tiles": found.num_rows}


def _unreadable(path: Path, what: str) -> str:
    return f"tile index {path} is damaged: its facts cannot be read ({what}); delete it and index the slide again"
