"""A fixed number of random tiles a slide, none over another: how the paper makes its bags."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform

from cytossl_monai.data.tiles.index_file import TileIndex

__all__ = ["TileChoice", "TilesPerSlided", "choose_tiles"]

logger = logging.getLogger(__name__)


def choose_tiles(coords: np.ndarray, size: int, count: int, slide_id: str, seed: int = 0) -> np.ndarray:
    """Draw tiles of a slide at random, leaving out those that lie over one drawn before.

    Which ones are drawn follows from the seed and the slide's name alone, so training, test and a second run agree.

    Args:
        coords: (N, 2) x and y of the tiles' corners.
        size: their side, in the units of ``coords``; 0 where it is unknown, and overlap is then not looked at.
        count: how many to draw, at least 1.
        slide_id: the slide.
        seed: same seed, same tiles.

    Returns:
        int64, rising: at most ``count`` row numbers; all (that do not overlap) where there are fewer.

    Raises:
        ValueError: for a count below 1.
    """
    if count < 1:
        raise ValueError(f"tiles_per_slide must be at least 1, got {count}")
    digest = hashlib.sha256(f"{seed}:{slide_id}".encode()).digest()
    order = np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(len(coords))
    if size <= 0:
        return np.sort(order[:count])
    kept: list[int] = []
    # Boxes of the tile's size: whatever overlaps a tile has its corner in the same box or in one beside it.
    boxes: dict[tuple[int, int], list[int]] = {}
    for row in order.tolist():
        x, y = int(coords[row, 0]), int(coords[row, 1])
        column, line = x // size, y // size
        beside = (other for dx in (-1, 0, 1) for dy in (-1, 0, 1) for other in boxes.get((column + dx, line + dy), ()))
        if any(abs(int(coords[o, 0]) - x) < size and abs(int(coords[o, 1]) - y) < size for o in beside):
            continue
        boxes.setdefault((column, line), []).append(row)
        kept.append(row)
        if len(kept) == count:
            break
    return np.sort(np.asarray(kept, dtype=np.int64))


class TileChoice:
    """The random tiles of a slide's index that are embedded; the first slide with fewer is named in the log.

    Args:
        tiles_per_slide: how many; None keeps all.
        seed: same seed, same tiles.

    Raises:
        ValueError: for a number below 1.
    """

    def __init__(self, tiles_per_slide: int | None = 100, seed: int = 0) -> None:
        if tiles_per_slide is not None and tiles_per_slide < 1:
            raise ValueError(f"tiles_per_slide must be at least 1, got {tiles_per_slide}")
        self.tiles_per_slide, self.seed = tiles_per_slide, seed
        self._told = False

    def rows(self, coords: np.ndarray, size: int, slide_id: str) -> np.ndarray:
        """Row numbers of the tiles to keep; see :func:`choose_tiles`."""
        if self.tiles_per_slide is None:
            return np.arange(len(coords))
        rows = choose_tiles(coords, size, self.tiles_per_slide, slide_id, self.seed)
        if len(rows) < self.tiles_per_slide and not self._told:
            self._told = True
            logger.warning(
                "slide %s has %d tiles, fewer than tiles_per_slide %d: all are taken, and so of others like it",
                slide_id,
                len(rows),
                self.tiles_per_slide,
            )
        return rows

    def __call__(self, index: TileIndex) -> TileIndex:
        """The index of the tiles to keep."""
        if self.tiles_per_slide is None:
            return index
        rows = self.rows(index.coords, int(index.table["size"].max()), index.slide_id)
        return TileIndex(index.table.iloc[rows], index.meta)


class TilesPerSlided(MapTransform):
    """Keep ``tiles_per_slide`` random tiles of a bag that do not overlap, the same ones each time.

    A slide with fewer keeps all of them; the first such slide is named in the log.

    Args:
        tiles_per_slide: how many; None keeps all tiles.
        seed: same seed, same tiles.
        keys: what to take the tiles from; ``coords`` must be among the item's keys, and ``tile_size`` (side of a tile
            in their units) is looked at where it is there.
        allow_missing_keys: see MONAI.
    """

    def __init__(
        self,
        tiles_per_slide: int | None = 100,
        seed: int = 0,
        keys: str | Sequence[str] = ("features", "coords"),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.choice = TileChoice(tiles_per_slide, seed)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Item with all tiles -> item with some."""
        item = dict(data)
        coords = np.asarray(item["coords"])
        rows = self.choice.rows(coords, int(item.get("tile_size") or 0), str(item["slide_id"]))
        if len(rows) < len(coords):
            for key in self.key_iterator(item):
                item[key] = item[key][torch.from_numpy(rows)]
        return item
