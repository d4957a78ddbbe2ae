"""The nuclei of a slide, one row each, as one Parquet file beside its tile index."""

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

__all__ = ["NUCLEUS_COLUMNS", "NucleusTable", "nuclei_path"]

VERSION = 1
NUCLEUS_COLUMNS: dict[str, str] = {
    "x": "float64",
    "y": "float64",
    "area_um2": "float32",
    "density": "float32",
    "elongation": "float32",
}
"""``x, y``: centre in level-0 pixels. ``area_um2``: square micrometres. ``density``: mean optical density in red and
green. ``elongation``: length over width, 1 for a circle."""
_META_KEY = b"cytossl_nuclei"


def nuclei_path(index_path: str | os.PathLike[str]) -> Path:
    """Where the nuclei of an index lie: ``nuclei/<slide_id>.parquet`` in the folder of ``<slide_id>.parquet``."""
    path = Path(index_path)
    return path.parent / "nuclei" / path.name


class NucleusTable:
    """The nuclei of one slide's kept tiles.

    Args:
        table: one row a nucleus with the columns of ``NUCLEUS_COLUMNS``.
        meta: JSON-able facts; ``slide_id`` and ``fingerprint`` say of which slide.

    Raises:
        TableError: when a column is missing or not of its type.
    """

    def __init__(self, table: pd.DataFrame, meta: Mapping[str, Any]) -> None:
        absent = [name for name in NUCLEUS_COLUMNS if name not in table.columns]
        if absent:
            raise TableError(f"table of nuclei without the column {', '.join(absent)}; index the slide again")
        try:
            self.table = table.astype(NUCLEUS_COLUMNS).reset_index(drop=True)
        except (TypeError, ValueError) as error:
            raise TableError(f"table of nuclei of a wrong type ({error}); index the slide again") from error
        self.meta: dict[str, Any] = {"version": VERSION, **meta}

    def __len__(self) -> int:
        return len(self.table)

    @property
    def centres(self) -> np.ndarray:
        """(N, 2) float64: x, y in level-0 pixels."""
        return self.table[["x", "y"]].to_numpy(dtype=np.float64)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as Parquet, atomically; folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrow = pa.Table.from_pandas(self.table, preserve_index=False)
        meta = json.dumps(self.meta, allow_nan=False, sort_keys=True).encode()
        arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), _META_KEY: meta})
        with atomic_path(path) as partial:
            pq.write_table(arrow, partial, compression="zstd")
        return path

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> NucleusTable:
        """Read the nuclei of a slide.

        Raises:
            TableError: when the file is missing, damaged, no table of nuclei, or of a newer version.
        """
        path = Path(path)
        meta = cls.read_meta(path)
        try:
            arrow = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"table of nuclei {path} is damaged ({error}); delete it and index again") from error
        try:
            return cls(arrow.to_pandas(), meta)
        except TableError as error:
            raise TableError(f"{path}: {error}") from error

    @staticmethod
    def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
        """What the table says of itself, without reading its rows.

        Raises:
            TableError: as for ``read``.
        """
        path = Path(path)
        if not path.is_file():
            raise TableError(f"{path} does not exist: the index is of an older version; index the slide again")
        try:
            stored = (pq.read_metadata(path).metadata or {}).get(_META_KEY)
        except (pa.ArrowException, OSError) as error:
            raise TableError(f"table of nuclei {path} is damaged ({error}); delete it and index again") from error
        if stored is None:
            raise TableError(f"{path} is no table of nuclei; give the folder that index.json wrote")
        try:
            meta: dict[str, Any] = dict(json.loads(stored))
            version = int(meta.get("version", 0))
        except (ValueError, TypeError, RecursionError) as error:
            raise TableError(f"table of nuclei {path} is damaged ({error}); delete it and index again") from error
        if version > VERSION:
            raise TableError(
                f"table of nuclei {path} is of version {meta['version']}, this program reads up to {VERSION}; "
                "update the program or index the slide again"
            )
        return meta
