"""What a slide cannot give: tiles that cannot be decoded, up to a share, and why a slide has no tile at all."""

from __future__ import annotations

import numpy as np

from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.index.low_power import Grid
from cytossl_monai.utils.errors import SlideError

__all__ = ["check_unreadable", "find_unreadable", "why_empty"]


def find_unreadable(
    slide: Slide,
    grid: Grid,
    worthy: np.ndarray,
    tile_size: int,
    mpp: float,
    max_unreadable: float,
    num_threads: int = 1,
) -> np.ndarray:
    """Which tiles worth looking at cannot be decoded soundly.

    Args:
        slide: open slide.
        grid: its tiles.
        worthy: (rows, columns) bool, the tiles worth looking at.
        tile_size: side of a tile in pixels at ``mpp``.
        mpp: micrometres per pixel that tiles are read at.
        max_unreadable: share of them that may be damaged.
        num_threads: tiles of the file decoded at once.

    Returns:
        (rows, columns) bool.

    Raises:
        SlideError: when they are more than that share.
    """
    unreadable = np.zeros_like(worthy)
    rows, columns = np.nonzero(worthy)
    places = np.stack([columns, rows], 1) * grid.size
    unreadable[rows, columns] = ~slide.sound(places, tile_size, mpp, num_threads)
    check_unreadable(slide, int(unreadable.sum()), len(rows), max_unreadable)
    return unreadable


def check_unreadable(slide: Slide, damaged: int, looked_at: int, most: float, what: str = "tiles") -> None:
    """Refuse a slide of whose tiles (or ``what`` else) more than the share ``most`` cannot be decoded.

    Raises:
        SlideError: when they are more.
    """
    if damaged > most * looked_at:
        raise SlideError(
            f"{slide.path} is damaged: {damaged} of {looked_at} {what} cannot be decoded, more than max_unreadable "
            f"({most:.0%}); copy the file again from the scanner or leave it out"
        )


def why_empty(record: SlideRecord, index: TileIndex) -> str:
    """One sentence on why an index holds no tile, and what to do."""
    tiles = index.meta["tiles"]
    if tiles["ink"] and not tiles["proposed"]:
        found = f"{tiles['ink']} tiles under pen marks and no cells elsewhere"
    elif not tiles["proposed"] and tiles["unreadable"]:
        found = f"{tiles['unreadable']} damaged tiles and no cells elsewhere"
    elif not tiles["proposed"]:
        found = "nothing but glass"
    elif tiles["out_of_focus"]:
        found = f"{tiles['out_of_focus']} tiles with nuclei, all out of focus"
    else:
        found = f"{tiles['without_nuclei']} tiles with something on them, none with a nucleus"
    return (
        f"{record.path} is empty of cells: {found}; check the slide and its mpp ({index.level0_mpp:g}), "
        "or loosen the thresholds of the index"
    )
