"""Which instances of a slide are embedded: those asked for, less fields around nuclei that reach into damage."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.index.damage import check_unreadable
from cytossl_monai.index.settings import IndexSettings

__all__ = ["damage_in_words", "in_words", "index_hash", "sound_instances", "stored_instances"]


def index_hash(index: TileIndex) -> str:
    """16 hexadecimal digits of which tiles were asked for and how: places, tile size, resolution.

    Fields that `sound_instances` leaves out count, so that what was made is known as current without decoding it again.
    """
    if "asked" in index.meta:
        return str(index.meta["asked"])
    digest = hashlib.sha256(np.ascontiguousarray(index.coords).tobytes())
    digest.update(json.dumps([index.tile_size, index.mpp, index.level0_mpp]).encode())
    return digest.hexdigest()[:16]


def sound_instances(slide: Slide, index: TileIndex, num_threads: int = 1) -> TileIndex:
    """The index without the fields around nuclei that cannot be decoded soundly; tiles of the grid stay as they are.

    Indexing has looked at the tiles that it kept. A field reaches past the tile of its nucleus, where nobody looked.

    Args:
        slide: the open slide.
        index: its tiles, or its fields.
        num_threads: tiles of the file decoded at once.

    Returns:
        the index, with ``unreadable_fields`` in its metadata where some are left out.

    Raises:
        SlideError: when more than the index's ``max_unreadable`` of the fields are damaged.
    """
    if index.meta.get("instances") != "nuclei" or not len(index):
        return index
    sound = slide.sound(index.coords, index.tile_size, index.mpp, num_threads)
    most = index.meta["settings"].get("max_unreadable", IndexSettings.max_unreadable)
    check_unreadable(slide, int((~sound).sum()), len(index), most, "fields around nuclei")
    return _part(index, sound)


def stored_instances(index: TileIndex, coords: np.ndarray) -> TileIndex:
    """Those of the instances asked for that a feature file holds: what `sound_instances` gave when it was written.

    Args:
        index: what was asked for.
        coords: (N, 2) the places in the feature file.
    """
    if index.meta.get("instances") != "nuclei":
        return index
    places = set(map(tuple, coords.tolist()))
    return _part(index, np.array([place in places for place in map(tuple, index.coords.tolist())], bool))


def in_words(index: TileIndex, left_out: int = 0, kind: str | None = None) -> str:
    """How many instances there are, and how many fields were left out as damaged.

    Args:
        index: the instances.
        left_out: how many of them were left out when they were embedded, where ``index`` is what was asked for.
        kind: what they are called; None for ``tiles`` or ``nuclei``.
    """
    lost = int(index.meta.get("unreadable_fields", 0)) + left_out
    return f"{len(index) - left_out} {kind or index.meta.get('instances', 'tiles')}{damage_in_words(lost)}"


def damage_in_words(lost: int) -> str:
    """What is put behind a number of instances where so many fields were left out as damaged."""
    return f"; {lost} damaged fields left out" if lost else ""


def _part(index: TileIndex, kept: np.ndarray) -> TileIndex:
    if kept.all():
        return index
    lost = int((~kept).sum()) + int(index.meta.get("unreadable_fields", 0))
    return TileIndex(index.table[kept], {**index.meta, "asked": index_hash(index), "unreadable_fields": lost})
