"""The tile index: which tiles of a slide are worth looking at, as one Parquet file a slide."""

from __future__ import annotations

import json
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
            return cls(pq.read_table(path).to_pandas(), meta)
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"tile index {path} is damaged ({error}); delete it and index the slide again") from error

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
        meta: dict[str, Any] = json.loads(stored)
        if int(meta.get("version", 0)) > VERSION:
            raise TableError(
                f"tile index {path} is of version {meta['version']}, this program reads up to {VERSION}; "
                "update the program or index the slide again"
            )
        return {**meta, "n_tiles": found.num_rows}
