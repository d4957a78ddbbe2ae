"""Nuclei of a detector, as outlines or points in level-0 pixels: one Parquet file a slide, drawn into any tile."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from skimage.draw import polygon

from cytossl_monai.utils.errors import TableError
from cytossl_monai.utils.files import atomic_path

__all__ = ["KnownNuclei", "NucleusOutlines"]

_META_KEY = b"cytossl_outlines"
_MOST = 2**15 - 1  # numbers of an int16 map


@dataclass
class NucleusOutlines:
    """The nuclei of one slide.

    Args:
        centres: (N, 2) float64, x and y in level-0 pixels, the slide's left and upper border at 0.
        reach: (N,) float32, level-0 pixels: how far an outline goes from its centre; of a point the radius of the disc
            that stands for it.
        vertices: (M, 2) float32, the outlines' corners one after the other, less their nucleus' centre.
        counts: (N,) int32, corners of each nucleus; 0: only its centre is known.
        meta: JSON-able facts: what it was made of.
    """

    centres: np.ndarray
    reach: np.ndarray
    vertices: np.ndarray
    counts: np.ndarray
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        order = np.argsort(self.centres[:, 1], kind="stable")  # by row: a tile's nuclei lie in one stretch
        starts = np.cumsum(self.counts) - self.counts
        parts = [self.vertices[starts[i] : starts[i] + self.counts[i]] for i in order]
        self.vertices = np.concatenate(parts) if parts else np.zeros((0, 2), np.float32)
        self.centres, self.reach, self.counts = self.centres[order], self.reach[order], self.counts[order]
        self._starts = np.cumsum(self.counts) - self.counts
        self._most = float(self.reach.max(initial=0.0))

    def __len__(self) -> int:
        return len(self.centres)

    @classmethod
    def of(
        cls,
        outlines: Sequence[np.ndarray],
        points: np.ndarray | None = None,
        radius: float | np.ndarray = 0.0,
        meta: Mapping[str, Any] | None = None,
    ) -> NucleusOutlines:
        """Gather outlines and points.

        Args:
            outlines: (n, 2) x and y of each nucleus' corners, level-0 pixels.
            points: (P, 2) x and y of nuclei without an outline.
            radius: of the discs that stand for the points, one for all or one each, level-0 pixels.
            meta: what they were made of.
        """
        points = np.zeros((0, 2)) if points is None else np.asarray(points, np.float64).reshape(-1, 2)
        middles = [_middle(ring) for ring in outlines]
        vertices = [np.asarray(ring, np.float64) - middle for ring, middle in zip(outlines, middles)]
        reach = [float(np.hypot(*ring.T).max()) for ring in vertices]
        return cls(
            np.concatenate([np.asarray(middles, np.float64).reshape(-1, 2), points]),
            np.concatenate([reach, np.broadcast_to(radius, len(points))]).astype(np.float32),
            np.concatenate(vertices).astype(np.float32) if vertices else np.zeros((0, 2), np.float32),
            np.array([*map(len, vertices), *[0] * len(points)], dtype=np.int32),
            dict(meta or {}),
        )

    def draw(self, x: float, y: float, side: float, pixels: int) -> np.ndarray:
        """The instance map of a tile.

        Args:
            x: its left border, level-0 pixels.
            y: its upper border.
            side: its side, level-0 pixels.
            pixels: side of the map.

        Returns:
            int16 (1, pixels, pixels): 0 outside, 1, 2, ... the nuclei that reach into the tile. A later one covers.
        """
        scale = pixels / side
        labels = np.zeros((pixels, pixels), dtype=np.int16)
        first, last = np.searchsorted(self.centres[:, 1], [y - self._most, y + side + self._most])
        near = self.centres[first:last] - (x, y)
        reach = self.reach[first:last, None]
        inside = ((near + reach > 0) & (near - reach < side)).all(1)
        for number, row in enumerate((np.flatnonzero(inside) + first)[:_MOST], start=1):
            middle = (self.centres[row] - (x, y)) * scale
            if self.counts[row]:
                start = self._starts[row]
                corners = self.vertices[start : start + self.counts[row]] * scale + middle
            else:
                corners = middle + self.reach[row] * scale * _CIRCLE
            # A pixel is covered where its centre is: that of pixel 0 lies at 0.5.
            rows, columns = polygon(corners[:, 1] - 0.5, corners[:, 0] - 0.5, labels.shape)
            if len(rows):
                labels[rows, columns] = number
            elif (middle >= 0).all() and (middle < pixels).all():  # smaller than a pixel
                labels[int(middle[1]), int(middle[0])] = number
        return labels[None]

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write as Parquet, atomically."""
        path = Path(path)
        offsets = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)
        columns = {"x": self.centres[:, 0], "y": self.centres[:, 1], "reach": self.reach}
        for number, name in enumerate(("outline_x", "outline_y")):
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(self.vertices[:, number]))
        table = pa.table(columns).replace_schema_metadata({_META_KEY: json.dumps(dict(self.meta)).encode()})
        with atomic_path(path) as partial:
            pq.write_table(table, partial, compression="zstd")
        return path

    @staticmethod
    def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
        """What the file was made of; nothing where it is absent, damaged or of another kind."""
        try:
            stored = (pq.read_metadata(path).metadata or {}).get(_META_KEY)
            return dict(json.loads(stored or b"{}"))
        except (OSError, pa.ArrowException, ValueError):
            return {}

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> NucleusOutlines:
        """Read what :meth:`write` wrote.

        Raises:
            TableError: when the file is damaged or of another kind.
        """
        try:
            table = pq.read_table(path).combine_chunks()
            across, down = (table[name].combine_chunks() for name in ("outline_x", "outline_y"))
            across, down = (one.chunk(0) if isinstance(one, pa.ChunkedArray) else one for one in (across, down))
            return cls(
                np.stack([table["x"].to_numpy(), table["y"].to_numpy()], 1),
                table["reach"].to_numpy(),
                np.stack([across.flatten().to_numpy(), down.flatten().to_numpy()], 1),
                np.diff(across.offsets.to_numpy()).astype(np.int32),
                cls.read_meta(path),
            )
        except (OSError, pa.ArrowException, KeyError, IndexError, ValueError) as error:
            raise TableError(f"nuclei {path} are damaged ({error}); delete the file, it is made again") from error


_ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)


def _middle(ring: np.ndarray) -> np.ndarray:
    """Centre of an outline's area; of a line or a point the mean of its corners."""
    x, y = (np.asarray(ring, np.float64) - ring[0]).T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    area = cross.sum() / 2
    if abs(area) < 1e-9:
        return np.asarray(ring, np.float64).mean(0)
    return np.asarray(
        [((x + np.roll(x, -1)) * cross).sum(), ((y + np.roll(y, -1)) * cross).sum()] / (6 * area) + np.asarray(ring[0])
    )


class KnownNuclei:
    """Files of nuclei by slide, read at their first use; a worker's copy starts empty.

    Args:
        files: what :meth:`NucleusOutlines.write` wrote, by ``slide_id``.
        missing: why a slide has none, by ``slide_id``.
        max_open: slides whose nuclei stay in memory.
    """

    def __init__(self, files: Mapping[str, Path], missing: Mapping[str, str] | None = None, max_open: int = 32) -> None:
        self.files, self.missing, self.max_open = dict(files), dict(missing or {}), max_open
        self._read: OrderedDict[str, NucleusOutlines] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": OrderedDict()}

    def why_not(self, slide_id: str) -> str | None:
        """Why nothing is known of a slide; None where its nuclei are."""
        return None if slide_id in self.files else self.missing.get(slide_id, "no file of nuclei")

    def of(self, slide_id: str) -> NucleusOutlines:
        """The nuclei of a slide."""
        if slide_id not in self._read:
            self._read[slide_id] = NucleusOutlines.read(self.files[slide_id])
        self._read.move_to_end(slide_id)
        while len(self._read) > self.max_open:
            self._read.popitem(last=False)
        return self._read[slide_id]
