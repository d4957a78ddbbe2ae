"""Open a slide with whatever library can really decode it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np

from cytossl_monai.data.slides.formats import advice
from cytossl_monai.data.slides.probes import is_tiff, probe, probe_places, probes_agree, truncated_tiff
from cytossl_monai.data.slides.readers.base import Backend, BackendError
from cytossl_monai.data.slides.readers.openslide import OpenSlideBackend
from cytossl_monai.data.slides.readers.tifffile import TiffFileBackend
from cytossl_monai.data.slides.slide import BACKENDS, Slide
from cytossl_monai.data.slides.tiff_tiles import Contradiction, TiffTiles, read_tiff_tiles
from cytossl_monai.utils.errors import SlideError

__all__ = ["MAX_MPP", "MIN_MPP", "open_slide"]

MIN_MPP, MAX_MPP = 0.05, 20.0
"""Micrometres per pixel outside of which a stated resolution is taken for a mistake (72 dpi are 353 um/px)."""


_ATTEMPTS = 6

_checked: dict[tuple[str, int, int], str] = {}


def open_slide(
    path: str | os.PathLike[str],
    backend: Literal["auto", "cucim", "openslide", "tifffile", "frame"] = "auto",
    mpp: float | None = None,
    device: str = "cpu",
    local: str | os.PathLike[str] | None = None,
) -> Slide:
    """Open a slide with the first library that can really decode it.

    cuCIM, then OpenSlide, then tifffile, then ITK (frames: PNG, JPEG, TIFF, DICOM). A file that ends too early, one
    whose tables contradict themselves, one whose pixels are not 8-bit RGB or grey and one whose pixels the libraries do
    not agree on is refused: cuCIM alone would return garbage for it, silently. A damaged tile does not close the slide:
    `Slide.read_sound` says which regions it spoils.

    Args:
        path: the slide. For MRXS the ``.mrxs`` file, for a DICOM slide any ``.dcm`` of its series.
        backend: a name, to insist on one library.
        mpp: micrometres per pixel of level 0; overrides what the file states.
        device: ``"cuda"`` decodes on the GPU (cuCIM with cupy and nvimgcodec) and returns tensors there.
        local: a copy of the slide to read from (`SlideCache`); messages and files name ``path`` all the same.

    Returns:
        the open slide.

    Raises:
        SlideError: when the file is missing, damaged or no image, or states no usable resolution.
        ValueError: for an unknown backend.
    """
    path = Path(path)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, but is {backend!r}")
    if mpp is not None and not (np.isfinite(mpp) and MIN_MPP <= mpp <= MAX_MPP):
        raise SlideError(
            f"{path}: mpp {mpp} is not between {MIN_MPP} and {MAX_MPP} micrometres per pixel; "
            "correct the mpp column of the slide table (or the mpp argument)."
        )
    if not path.exists():
        raise SlideError(f"{path} does not exist; correct its path in the slide table.")
    if not path.is_file() and not path.is_dir():
        raise SlideError(f"{path} is no file but a pipe, a socket or a device; correct its path in the slide table.")
    if path.is_file() and path.stat().st_size == 0:
        raise SlideError(f"{path} is empty (0 bytes); copy it again from the scanner.")
    source_file = path if local is None else Path(local)
    handle = _open_backend(source_file, backend)
    try:
        value, source = (float(mpp), "argument") if mpp is not None else (_file_mpp(path, handle), "file")
        return Slide(path, handle, value, source, device, source_file)
    except BaseException:
        handle.close()
        raise


def _file_mpp(path: Path, handle: Backend) -> float:
    complaint = handle.resolution.complaint(MIN_MPP, MAX_MPP)
    if complaint is not None:
        joint = "" if complaint.endswith(" or") else ";"
        raise SlideError(
            f"{path} {complaint}{joint} give micrometres per pixel in the mpp column of the slide table "
            "(or the mpp argument)."
        )
    return float(handle.resolution.mpp or 0.0)


def _open_backend(path: Path, backend: str) -> Backend:
    """Open by name, or by trying; the choice for an unchanged file is remembered within the process."""
    status = path.stat()
    key = (f"{backend}:{path.resolve()}", status.st_size, status.st_mtime_ns)
    if key in _checked:
        try:
            return BACKENDS[_checked[key]](path)
        except BackendError as error:
            raise SlideError(f"{path} could be read before and cannot be opened now: {error}.") from error
    missing = truncated_tiff(path) if path.is_file() else None
    if missing:
        raise SlideError(f"{path} is truncated: {missing}; copy it again from the scanner or leave it out.")
    tiles = read_tiff_tiles(path) if is_tiff(path) else None
    if isinstance(tiles, Contradiction):
        raise SlideError(f"{path} contradicts itself: {tiles}; copy it again from the scanner or leave it out.")
    if isinstance(tiles, TiffTiles) and tiles.refusal:
        raise SlideError(f"{path} {tiles.refusal}, or leave it out.")
    suffix = path.suffix.lower()
    names = (
        [backend] if backend != "auto" else [n for n, b in BACKENDS.items() if not b.suffixes or suffix in b.suffixes]
    )
    failures: list[str] = []
    if tiles is None:
        # Neither would say more about such a file, and libtiff would print to the terminal.
        if suffix in (".tif", ".tiff", ".svs"):
            failures.append("its suffix says TIFF, its first bytes do not")
        names = [name for name in names if name not in ("cucim", "tifffile")]
    for name in names:
        try:
            handle = _open_and_probe(path, name, tiles if isinstance(tiles, TiffTiles) else None, backend == "auto")
        except BackendError as error:
            failures.append(f"{name}: {str(error).strip().rstrip('.')}")
            continue
        _checked[key] = name
        return handle
    raise SlideError(
        f"{path} is not a readable slide or image ({'; '.join(failures) or 'no reader for this format'}); "
        f"{advice(suffix)}."
    )


def _open_and_probe(path: Path, name: str, tiles: TiffTiles | None, choose: bool) -> Backend:
    """Open and decode samples. What cuCIM decodes must look the same to a second reader: it never reports damage."""
    handle = BACKENDS[name](path)
    try:
        if choose and tiles is not None and len(tiles.levels) > len(handle.level_dimensions):
            raise BackendError(f"sees {len(handle.level_dimensions)} of {len(tiles.levels)} levels (SubIFDs)")
        places = probe_places(handle.level_dimensions, tiles)
        if tiles is None and name == "openslide":
            return _probe_somewhere(path, handle)
        seen = probe(handle, places)
        if name == "cucim":
            _second_opinion(path, handle, seen, places)
    except BaseException:
        handle.close()
        raise
    return handle


def _probe_somewhere(path: Path, handle: Backend) -> Backend:
    """Probe a vendor's format, elsewhere where the first places are damaged; OpenSlide reads nothing after an error."""
    width, height = handle.level_dimensions[0]
    first = probe_places(handle.level_dimensions)
    for attempt in range(_ATTEMPTS):
        share = attempt / _ATTEMPTS
        corner = np.array([[int((width - 64) * share), int((height - 64) * (1 - share))]], np.int64).clip(0)
        try:
            probe(handle, first if attempt == 0 else [corner, *first[1:]])
            return handle
        except BackendError:
            handle.close()
            if attempt == _ATTEMPTS - 1:
                raise
            handle = type(handle)(path)
    return handle


def _second_opinion(path: Path, handle: Backend, seen: list[np.ndarray], places: list[np.ndarray]) -> None:
    complaints = []
    for other in (OpenSlideBackend, TiffFileBackend):
        try:
            witness = other(path)
        except BackendError:
            continue
        try:
            if witness.level_dimensions[0] != handle.level_dimensions[0]:
                complaints.append(f"{other.name} sees another size")
            elif probes_agree(seen, probe(witness, _places_of(witness, places))):
                return
            else:
                complaints.append(f"{other.name} decodes other pixels")
        except BackendError as error:
            complaints.append(f"{other.name} cannot decode it: {error}")
        finally:
            witness.close()
    if complaints:
        raise BackendError("; ".join(complaints))


def _places_of(witness: Backend, places: list[np.ndarray]) -> list[np.ndarray]:
    """The same places of level 0; the coarsest level is another one where the witness sees other levels."""
    usual = probe_places(witness.level_dimensions)
    return [places[0], *usual[1:]]
