"""Nuclei that a detector found, read once and kept beside the index: CellViT, Cellpose, StarDist, InstanSeg, QuPath."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.measure import find_contours
from tifffile import TiffFileError, imread

from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.data.tiles.nuclei_file import NucleusTable, nuclei_path
from cytossl_monai.data.tiles.outlines import KnownNuclei, NucleusOutlines
from cytossl_monai.transforms.nuclei.imported import labels_from_map, nuclei_from_geojson
from cytossl_monai.utils.errors import InputError, TableError, reason
from cytossl_monai.utils.files import file_fingerprint, read_json, visible_files
from cytossl_monai.utils.locks import item_lock

__all__ = ["detected_nuclei", "read_detections"]

logger = logging.getLogger(__name__)

ENDINGS = (
    *("_cells.geojson", "_cells.json", ".geojson", ".json", "/cells.geojson", "/cells.json"),
    *("_cp_masks.tif", "_cp_masks.png", "_instanseg_prediction.tiff", ".tif", ".tiff", ".png", ".npy"),
    *("_cp_outlines.txt", "_cell_detection.json", "/cell_detection.json", ".csv"),
)
"""How a detector's file of a slide may end, outlines before points."""
_UNREADABLE = (
    *(OSError, EOFError, SyntaxError, MemoryError, RecursionError, UnicodeDecodeError, csv.Error, TiffFileError),
    Image.DecompressionBombError,
)
"""What numpy, Pillow, tifffile and Python raise over damaged files, and over sizes that no memory holds."""
_POINT_UM = 4.0
"""Radius of the disc that stands for a point: about that of an intermediate cell's nucleus."""
_VERSION = 1


def read_detections(
    path: str | os.PathLike[str],
    size: tuple[int, int],
    mpp: float,
    bounds_offset: tuple[float, float] = (0.0, 0.0),
) -> NucleusOutlines:
    """Nuclei of a slide from the file of a detector.

    Read are GeoJSON (QuPath, StarDist and InstanSeg in QuPath, CellViT), polygons and points; CellViT's ``cells.json``
    and ``cell_detection.json``; maps of whole numbers (``.tif``, ``.png``, ``.npy``) of the whole slide at any
    resolution, of which the first plane counts (Cellpose's ``_cp_masks``, StarDist's labels, InstanSeg's nuclei before
    its cells); Cellpose's ``_cp_outlines.txt``; tables with the columns ``x`` and ``y`` (``.csv``). Places are level-0
    pixels. Nothing that a file holds is executed: pickles (Cellpose's ``_seg.npy``) are refused.

    Args:
        path: the file.
        size: width and height of the slide, level-0 pixels.
        mpp: micrometres per level-0 pixel.
        bounds_offset: what QuPath takes from the places of an MRXS slide; added to those of GeoJSON.

    Raises:
        InputError: when it cannot be read, is no such file, or does not fit the slide.
    """
    path = Path(path)
    kind = path.suffix.lower()
    points: np.ndarray | None = None
    try:
        if kind in (".geojson", ".json"):
            outlines, points = _from_json(path, bounds_offset)
        elif kind == ".txt":
            outlines = _from_text(path)
        elif kind == ".csv":
            outlines, points = [], _from_table(path)
        else:
            outlines = list(_from_map(path, size))
    except _UNREADABLE as error:
        raise InputError(
            f"nuclei {path} cannot be read ({reason(error)}); write them again with the detector"
        ) from error
    found = NucleusOutlines.of(outlines, points, _POINT_UM / mpp)
    outside = ((found.centres < 0) | (found.centres > size)).any(1)
    if len(found) and outside.mean() > 0.01:
        raise InputError(
            f"nuclei {path}: {int(outside.sum())} of {len(found)} lie outside of the slide's {size[0]} x {size[1]} px: "
            "places must be pixels of the slide at full resolution; is it of another slide?"
        )
    return found


def _from_json(path: Path, bounds_offset: tuple[float, float]) -> tuple[list[np.ndarray], np.ndarray]:
    content = read_json(path, "write the nuclei again with the detector")
    if isinstance(content, Mapping) and isinstance(content.get("cells"), list):
        return _from_cellvit(content["cells"], path)
    outlines, points = nuclei_from_geojson(content, str(path))
    return [ring + bounds_offset for ring in outlines], points + bounds_offset


def _from_cellvit(cells: list[Any], path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """CellViT: ``contour`` and ``centroid`` are numbers of pixels, whose middles lie half a pixel on."""
    outlines, points = [], []
    for number, cell in enumerate(cells):
        try:
            contour = cell.get("contour")
            if contour is not None and len(contour) >= 3:
                outlines.append(_places(contour) + 0.5)
            else:
                points.append(_places([cell["centroid"]])[0] + 0.5)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"nuclei {path}: cell {number} has neither a contour nor a centroid of x and y; write them again"
            ) from error
    return outlines, np.asarray(points, np.float64).reshape(-1, 2)


def _places(values: Any) -> np.ndarray:
    """(n, 2) finite numbers.

    Raises:
        ValueError: for anything else.
    """
    places = np.asarray(values, np.float64)
    if places.ndim != 2 or places.shape[1] != 2 or not np.isfinite(places).all():
        raise ValueError("no list of x, y")
    return places


def _from_text(path: Path) -> list[np.ndarray]:
    """Cellpose's outlines: a line a nucleus, ``x,y,x,y,...``, numbers of pixels."""
    outlines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            ring = _places(np.asarray([float(value) for value in line.split(",")]).reshape(-1, 2))
        except ValueError as error:
            raise InputError(
                f"nuclei {path}, line {number}: no x,y,x,y,... of an outline; write them again with Cellpose"
            ) from error
        outlines.append(ring + 0.5)
    return outlines


def _from_table(path: Path) -> np.ndarray:
    with open(path, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if not {"x", "y"} <= set(reader.fieldnames or ()):
            raise InputError(f"nuclei {path} have no columns x and y; give the centres in pixels of the slide")
        rows = []
        for row in reader:
            try:
                rows.append(_places([[row["x"], row["y"]]])[0])
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"nuclei {path}, line {reader.line_num}: x and y are {row['x']!r}, {row['y']!r}; give numbers"
                ) from error
    return np.asarray(rows, np.float64).reshape(-1, 2)


def _from_map(path: Path, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Outlines of the regions of a map, through the middles between pixels inside and outside."""
    if path.suffix.lower() == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except ValueError as error:
            if "pickle" not in str(error):
                raise InputError(f"nuclei {path} cannot be read ({reason(error)}); write them again") from error
            raise InputError(
                f"nuclei {path} hold Python objects, which are not opened: they could run code; save a map of whole "
                "numbers (Cellpose: --save_tif or --save_png)"
            ) from error
    elif path.suffix.lower() in (".tif", ".tiff"):
        array = imread(path)
    else:
        with Image.open(path) as image:
            array = np.asarray(image)
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[0] <= 4 and array.shape[-1] > 4:
        array = array[0]
    try:
        labels = labels_from_map(array, str(path))
    except ValueError as error:
        raise InputError(f"nuclei {error}") from error
    across, down = size[0] / labels.shape[1], size[1] / labels.shape[0]
    if abs(across / down - 1) > 0.01:
        raise InputError(
            f"nuclei {path}: a map of {labels.shape[1]} x {labels.shape[0]} does not fit the slide's {size[0]} x "
            f"{size[1]} px: it must show all of the slide, at any resolution"
        )
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        region = np.pad(labels[place] == number, 1)
        ring = max(find_contours(region.astype(np.float32), 0.5), key=len)[:-1]
        corner = np.array([place[1].start, place[0].start]) - 0.5
        yield (ring[:, ::-1] + corner) * (across, down)


def detected_nuclei(index: str | os.PathLike[str], source: str | os.PathLike[str]) -> KnownNuclei:
    """The nuclei of all slides of an index, for pretraining, as ``outlines/<slide_id>.parquet`` beside it.

    Files are read once: what is there, made of the same file of the same slide, stays. A slide whose file is absent or
    unusable is told, and the others go on.

    Args:
        index: folder of the tile index.
        source: a folder with one file a slide, named by ``slide_id`` or the slide's file, that `read_detections` reads
            (it may be the index's own); or ``"index"``: the nuclei that the index itself found, as discs of their area.

    Raises:
        TableError: when the folder is absent, or no slide has nuclei.
    """
    folder = Path(index)
    from_index = str(source) == "index"
    if not from_index and not Path(source).is_dir():
        raise TableError(f"nuclei_source {source} is no folder; give the folder of a detector's files, or 'index'")
    files: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for file in visible_files(folder, "*.parquet"):
        meta = TileIndex.read_meta(file)
        slide_id = str(meta["slide_id"])
        kept = folder / "outlines" / file.name
        try:
            path = nuclei_path(file) if from_index else _file_of(Path(source), slide_id, Path(meta["slide_path"]))
            with item_lock(folder, f"{slide_id}.outlines", "reading nuclei"):
                _keep(path, meta, kept, from_index)
            files[slide_id] = kept
        except InputError as error:
            missing[slide_id] = str(error)
    if not files:
        why = next(iter(missing.values()), "it has no index file")
        raise TableError(f"no slide of {folder} has nuclei in {source}: {why}")
    return KnownNuclei(files, missing)


def _file_of(folder: Path, slide_id: str, slide: Path) -> Path:
    for name in dict.fromkeys((slide_id, slide.stem)):
        for ending in ENDINGS:
            path = folder / f"{name}{ending}"
            if path.is_file() and path.resolve() != slide.resolve():
                return path
        if (folder / f"{name}_seg.npy").is_file():
            raise TableError(
                f"{folder / name}_seg.npy is a pickle, which is not opened: it could run code; save Cellpose's masks "
                "with --save_tif or --save_png"
            )
    raise TableError(f"{folder} has no file of nuclei named {slide_id} or {slide.stem}; it may be .geojson, .json, "
                     ".tif, .png, .npy, .txt or .csv")  # fmt: skip


def _keep(path: Path, slide: Mapping[str, Any], kept: Path, from_index: bool) -> None:
    """Write ``kept``, unless it was made of the same file of the same slide."""
    mpp = float(slide["level0_mpp"])
    size = int(slide.get("width", 0)), int(slide.get("height", 0))
    if not path.is_file():
        raise TableError(f"{path} is not there; index the slide again")
    made_from = {
        "version": _VERSION,
        "slide_id": slide["slide_id"],
        "file": path.name,
        "fingerprint": file_fingerprint(path),
        "size": list(size),
        "mpp": mpp,
    }
    if NucleusOutlines.read_meta(kept) == made_from:
        return
    if from_index:
        nuclei = NucleusTable.read(path)
        radius = np.sqrt(nuclei.table["area_um2"].to_numpy(np.float64) / np.pi) / mpp
        found = NucleusOutlines.of([], nuclei.centres, radius)
    else:
        offset = slide.get("bounds_offset") or (0.0, 0.0)
        found = read_detections(path, size, mpp, (float(offset[0]), float(offset[1])))
    found.meta = made_from
    found.write(kept)
    logger.info("nuclei of %s: %d, from %s", slide["slide_id"], len(found), path)
