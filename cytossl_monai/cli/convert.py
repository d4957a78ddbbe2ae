"""``cytossl convert``: a pyramidal TIFF with its resolution from whatever opens, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.utils.errors import InputError
from cytossl_monai.utils.files import atomic_path

__all__ = ["convert", "convert_slide"]

_TILE = 256
_ROW_TILES = 16
"""Tiles of one row that are decoded at a time."""


def convert_slide(
    source: Path, target: Path, mpp: float | None = None, quality: int = 90, num_workers: int = 2
) -> Path:
    """Write a slide as a tiled, pyramidal JPEG TIFF that cuCIM, OpenSlide and tifffile open.

    Level 0 is the slide's own; each further level halves it, until one tile holds it. Outside of what was scanned is
    glass.

    Args:
        source: the slide.
        target: the TIFF, ``.tif`` or ``.tiff``.
        mpp: micrometres per pixel of level 0, where the file does not say.
        quality: of the JPEG, 1 to 100.
        num_workers: decoding threads.

    Returns:
        the path written.

    Raises:
        InputError: when the target is no TIFF, exists, or is the source.
        SlideError: when the slide cannot be read.
    """
    import tifffile

    if target.suffix.lower() not in (".tif", ".tiff"):
        raise InputError(f"{target} does not end in .tif; cytossl convert writes pyramidal TIFF")
    if target.exists():
        raise InputError(f"{target} exists; delete it or give another name")
    if not 1 <= quality <= 100:
        raise InputError(f"quality must be 1 to 100, not {quality}")
    with (
        open_slide(source, mpp=mpp) as slide,
        atomic_path(target) as partial,
        tifffile.TiffWriter(partial, bigtiff=True) as tif,
    ):
        for number, factor in enumerate(_factors(slide)):
            width, height = max(1, slide.width // factor), max(1, slide.height // factor)
            per_cm = 1e4 / (slide.mpp * factor)
            tif.write(
                _tiles(slide, factor, width, height, num_workers),
                shape=(height, width, 3),
                dtype=np.uint8,
                subfiletype=int(number > 0),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                tile=(_TILE, _TILE),
                compression="jpeg",
                compressionargs={"level": quality},
                photometric="rgb",
                metadata=None,
            )
    return target


def _factors(slide: Slide) -> list[int]:
    factors = [1]
    while min(slide.width, slide.height) // factors[-1] > 2 * _TILE:
        factors.append(2 * factors[-1])
    return factors


def _tiles(slide: Slide, factor: int, width: int, height: int, num_workers: int) -> Iterator[np.ndarray]:
    """Tiles (256, 256, 3) of one level, row by row."""
    columns, rows = -(-width // _TILE), -(-height // _TILE)
    for row in range(rows):
        for first in range(0, columns, _ROW_TILES):
            corners = [
                (c * _TILE * factor, row * _TILE * factor) for c in range(first, min(columns, first + _ROW_TILES))
            ]
            mpp = slide.mpp * factor if factor > 1 else None
            for tile in slide.read_regions(corners, _TILE, mpp, num_workers):
                yield np.ascontiguousarray(tile.transpose(1, 2, 0))


def convert(arguments: Sequence[str]) -> int:
    """``cytossl convert SLIDE OUT.tif [--mpp M] [--quality Q]``; returns the exit status.

    Raises:
        InputError: for wrong arguments; as `convert_slide`.
    """
    words, paths, numbers = list(arguments), [], {"mpp": None, "quality": 90.0}
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            print(
                "cytossl convert SLIDE OUT.tif [--mpp M] [--quality Q]\n\nWrites a tiled, pyramidal JPEG TIFF with its"
            )
            print("resolution. M: micrometres per pixel, where the slide does not say. Q: of the JPEG, default 90.")
            return 0
        if word in ("--mpp", "--quality") and words:
            value = words.pop(0)
            try:
                numbers[word.removeprefix("--")] = float(value)
            except ValueError:
                raise InputError(f"cytossl convert: {word} {value} is no number") from None
        elif word.startswith("--"):
            raise InputError(f"cytossl convert has no option {word}; it takes SLIDE OUT.tif --mpp M --quality Q")
        else:
            paths.append(Path(word))
    if len(paths) != 2:
        raise InputError("write cytossl convert SLIDE OUT.tif: the slide and the TIFF to be written")
    mpp, quality = numbers["mpp"], numbers["quality"]
    convert_slide(paths[0], paths[1], mpp, int(quality or 90))
    with open_slide(paths[1]) as written:
        print(written)
    return 0
