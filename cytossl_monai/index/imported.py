"""Tiles and tissue that other tools found, as tile indexes: TRIDENT's and CLAM's patches, masks of any tool."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy import ndimage
from skimage.measure import points_in_poly

from cytossl_monai.data.slide_table import SlideRecord, read_slide_table
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.data.tiles.index_file import COLUMNS, VERSION, TileIndex
from cytossl_monai.index.damage import check_unreadable
from cytossl_monai.index.low_power import Grid
from cytossl_monai.transforms.nuclei.mask import nuclei_mask
from cytossl_monai.utils.errors import TableError, failure, reason
from cytossl_monai.utils.files import file_fingerprint, read_json
from cytossl_monai.utils.parallel import run_parallel
from cytossl_monai.utils.report import RunReport

__all__ = ["TileImporter", "import_index", "read_coordinates", "tissue_at"]

_BATCH = 64
_FOREGROUND = 0.04  # optical density against the glass, as the index counts it


def read_coordinates(path: str | os.PathLike[str], slide: Slide) -> tuple[np.ndarray, int, int, float]:
    """Where TRIDENT or CLAM cut a slide.

    Args:
        path: an HDF5 file with ``coords``: TRIDENT's ``<name>_patches.h5``, CLAM's ``patches/<name>.h5``, or a feature
            file of either that kept the attributes of its coordinates.
        slide: the slide that it is of.

    Returns:
        (N, 2) int64 x, y of the top-left corners in level-0 pixels; the tiles' side in level-0 pixels; their side in
        pixels, and the micrometres per pixel that they are read at.

    Raises:
        TableError: where the file is damaged, says not enough, or does not fit the slide.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            coords = np.asarray(file["coords"][()])
            attrs = {str(key): value for key, value in file["coords"].attrs.items()}
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        raise TableError(f"{path}: has no readable 'coords' ({reason(error)}); cut the slide again") from error
    try:
        return _places(path, coords, attrs, slide)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"{path}: its coords or what they say of themselves are no numbers ({error})") from error


def _places(
    path: Path, coords: np.ndarray, attrs: Mapping[str, Any], slide: Slide
) -> tuple[np.ndarray, int, int, float]:
    if coords.ndim != 2 or coords.shape[1] != 2 or not len(coords):
        raise TableError(f"{path}: its coords are {coords.shape}, not (N, 2) with a tile; cut the slide again")
    if "patch_size" not in attrs:
        raise TableError(
            f"{path}: its coords do not say their patch_size: no file of TRIDENT or CLAM. Index the slide."
        )
    pixels = int(attrs["patch_size"])
    if "patch_size_level0" in attrs:
        side = int(attrs["patch_size_level0"])
    elif "patch_level" in attrs:
        level = int(attrs["patch_level"])
        if "downsample" in attrs:
            downsample = float(np.atleast_1d(attrs["downsample"])[0])
        elif level < len(slide.level_downsamples):
            downsample = slide.level_downsamples[level]
        else:
            raise TableError(f"{path}: was cut at level {level}, which {slide.path} has not: another slide?")
        side = round(pixels * downsample * float(attrs.get("custom_downsample", 1)))
    else:
        raise TableError(f"{path}: says neither patch_size_level0 (TRIDENT) nor patch_level (CLAM). Index the slide.")
    for name, own in (("level0_width", slide.width), ("level0_height", slide.height)):
        if name in attrs and int(attrs[name]) != own:
            raise TableError(f"{path}: is of a slide with {name} {int(attrs[name])}, {slide.path} has {own}.")
    if side < 1 or pixels < 1:
        raise TableError(f"{path}: has tiles of {pixels} pixels, {side} at level 0; cut the slide again")
    if not np.isfinite(coords).all():
        raise TableError(f"{path}: has coords that are no places; cut the slide again")
    coords = np.rint(coords).astype(np.int64)
    if (coords < 0).any() or (coords >= (slide.width, slide.height)).any():
        raise TableError(f"{path}: has tiles outside of {slide.path} ({slide.width} x {slide.height}): another slide?")
    return coords, side, pixels, slide.mpp * side / pixels


def tissue_at(path: str | os.PathLike[str], points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which points lie in the tissue that a file marks.

    Args:
        path: GeoJSON polygons in level-0 pixels (TRIDENT's ``contours_geojson``, QuPath), or a picture of the whole
            slide in which tissue is not black (``.png``, ``.tif``).
        points: (N, 2) x, y in level-0 pixels.
        size: width and height of the slide, level-0 pixels.

    Returns:
        (N,) bool.

    Raises:
        TableError: where the file is damaged or marks nothing.
    """
    path = Path(path)
    if path.suffix.lower() in (".geojson", ".json"):
        inside = np.zeros(len(points), dtype=bool)
        for outer, *holes in _polygons(path):
            here = points_in_poly(points, outer)
            for hole in holes:
                here &= ~points_in_poly(points, hole)
            inside |= here
        return inside
    try:
        with Image.open(path) as picture:
            mask = np.asarray(picture.convert("L")) > 0
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise TableError(f"{path}: cannot be read as a mask ({reason(error)}); give a picture or GeoJSON") from error
    rows = (points[:, 1] * mask.shape[0] / size[1]).astype(int).clip(0, mask.shape[0] - 1)
    columns = (points[:, 0] * mask.shape[1] / size[0]).astype(int).clip(0, mask.shape[1] - 1)
    return mask[rows, columns]


def _polygons(path: Path) -> list[list[np.ndarray]]:
    """Rings of each polygon, the outer one first."""
    try:
        content = read_json(path, "export the contours again", TableError)
        features = content if isinstance(content, list) else content.get("features", [content])
        polygons: list[list[np.ndarray]] = []
        for feature in features:
            shape = feature.get("geometry", feature)
            parts = {"Polygon": lambda c: [c], "MultiPolygon": list}.get(shape["type"])
            if parts is not None:
                for rings in parts(shape["coordinates"]):
                    polygons.append([np.asarray(ring, dtype=float)[:, :2] for ring in rings])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"{path}: is no GeoJSON of polygons ({reason(error)}); export the contours again") from error
    if not polygons:
        raise TableError(f"{path}: holds no polygon; export the contours again, or leave the slide out")
    return polygons


def import_index(
    record: SlideRecord,
    coords: str | os.PathLike[str] | None = None,
    tissue: str | os.PathLike[str] | None = None,
    tile_size: int = 224,
    mpp: float = 0.5,
    nuclei_mpp: float = 1.0,
    num_threads: int = 1,
    device: str = "cpu",
    max_unreadable: float = 0.05,
) -> TileIndex:
    """The index of a slide whose tiles or tissue another tool found. Nuclei are counted, nothing is left out for them.

    Args:
        record: the slide.
        coords: where its tiles lie, see `read_coordinates`; they say their size and resolution themselves.
        tissue: what marks its tissue, see `tissue_at`: tiles are kept whose centre lies in it. Without ``coords``
            they are laid on a grid.
        tile_size: pixels, for tiles on a grid.
        mpp: micrometres per pixel, for tiles on a grid.
        nuclei_mpp: micrometres per pixel at which nuclei are counted.
        num_threads: decoding threads.
        device: where to decode.
        max_unreadable: share of the tiles that may be damaged; up to it they are left out and counted.

    Raises:
        TableError: where neither is given, a file is unusable, or no tile is left.
        SlideError: when the slide cannot be read.
    """
    if coords is None and tissue is None:
        raise TableError(f"no coordinates and no mask of {record.slide_id}: index the slide instead")
    with open_slide(record.path, mpp=record.mpp, device=device) as slide:
        if coords is not None:
            places, side, tile_size, mpp = read_coordinates(coords, slide)
        else:
            side = max(1, round(tile_size * mpp / slide.mpp))
            grid = Grid.over(slide, side)
            rows, columns = np.divmod(np.arange(grid.rows * grid.columns), grid.columns)
            places = np.stack([columns, rows], axis=1) * side
        if tissue is not None:
            places = places[tissue_at(tissue, places + side / 2, (slide.width, slide.height))]
        if not len(places):
            raise TableError(f"{tissue}: no tile of {record.path} lies in its tissue; is it of this slide?")
        sound = slide.sound(places, tile_size, mpp, num_threads)
        check_unreadable(slide, int((~sound).sum()), len(places), max_unreadable)
        places = places[sound]
        nuclei, fraction, foreground = _statistics(slide, places, side, nuclei_mpp, num_threads)
        table = pd.DataFrame(
            {
                "slide_id": record.slide_id,
                "x": places[:, 0],
                "y": places[:, 1],
                "size": side,
                "level": slide.best_level(mpp),
                "mpp": mpp,
                "n_nuclei": nuclei,
                "nuclei_fraction": fraction,
                "foreground_fraction": foreground,
                "sharpness": 1.0,  # not measured: nothing is left out for it
            },
            columns=list(COLUMNS),
        )
        status = record.path.stat()
        meta: dict[str, Any] = {
            "version": VERSION,
            "slide_id": record.slide_id,
            "slide_path": str(record.path),
            "table_mpp": record.mpp,
            "fingerprint": file_fingerprint(record.path),
            "settings": {"tile_size": tile_size, "mpp": mpp, "nuclei_mpp": nuclei_mpp},
            "imported": {
                name: {"file": str(path), "fingerprint": file_fingerprint(Path(path))}
                for name, path in (("coords", coords), ("tissue", tissue))
                if path is not None
            },
            "slide_size": status.st_size,
            "slide_mtime": status.st_mtime,
            "width": slide.width,
            "height": slide.height,
            "level0_mpp": slide.mpp,
            "backend": slide.backend,
            "bounds_offset": list(slide.bounds_offset),
            "tiles": {"unreadable": int((~sound).sum()), "kept": len(places)},
            "nuclei": int(nuclei.sum()),
        }
    return TileIndex(table, meta)


def _statistics(
    slide: Slide, places: np.ndarray, side: int, nuclei_mpp: float, num_threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nuclei (N,) int64, their share of the tile and that of everything on the glass (N,) float32."""
    pixels = max(8, round(side * slide.mpp / nuclei_mpp))
    scale = side * slide.mpp / pixels
    glass = torch.as_tensor(slide.glass.astype(np.float32)).view(1, 3, 1, 1)
    count = np.zeros(len(places), dtype=np.int64)
    fraction, foreground = np.zeros(len(places), np.float32), np.zeros(len(places), np.float32)
    for start in range(0, len(places), _BATCH):
        part = slice(start, start + _BATCH)
        tiles = torch.as_tensor(slide.read_regions(places[part], pixels, scale, num_threads, damaged="glass")).cpu()
        mask = nuclei_mask(tiles, scale)[:, 0].numpy()
        count[part] = [ndimage.label(one)[1] for one in mask]
        fraction[part] = mask.mean(axis=(1, 2))
        density = torch.log10(glass / tiles.float().clamp_min(1.0)).amax(dim=1)
        foreground[part] = (density > _FOREGROUND).float().mean(dim=(1, 2)).numpy()
    return count, fraction, foreground


class TileImporter:
    """What the configuration ``import_tiles.json`` runs: a slide table and the files of another tool in, indexes out.

    Files are found by the slide's ``slide_id`` or by the name of its file: ``<name>_patches.h5`` (TRIDENT) or
    ``<name>.h5`` (CLAM, and feature files), ``<name>.geojson``, ``.png`` or ``.tif``.

    Args:
        slides: slide table or datalist.
        output_dir: folder to write ``<slide_id>.parquet`` and ``report.csv`` to.
        coords_dir: folder of the coordinates, or None.
        tissue_dir: folder of the masks, or None.
        tile_size: as for `import_index`.
        mpp: as for `import_index`.
        nuclei_mpp: as for `import_index`.
        num_workers: slides at once, each in a process; 0 works in this one.
        device: where to decode.
        progress: show a progress bar.

    Raises:
        TableError: when neither folder is given or one is not there.
    """

    def __init__(
        self,
        slides: str | os.PathLike[str],
        output_dir: str | os.PathLike[str],
        coords_dir: str | os.PathLike[str] | None = None,
        tissue_dir: str | os.PathLike[str] | None = None,
        tile_size: int = 224,
        mpp: float = 0.5,
        nuclei_mpp: float = 1.0,
        num_workers: int = 1,
        device: str = "cpu",
        progress: bool = True,
    ) -> None:
        if coords_dir is None and tissue_dir is None:
            raise TableError("give --coords_dir (patches of TRIDENT or CLAM), --tissue_dir (masks), or both")
        for name, folder in (("coords_dir", coords_dir), ("tissue_dir", tissue_dir)):
            if folder is not None and not Path(folder).is_dir():
                raise TableError(f"{name} {folder} is no folder")
        self.slides, self.output_dir = Path(slides), Path(output_dir)
        self.coords_dir = None if coords_dir is None else Path(coords_dir)
        self.tissue_dir = None if tissue_dir is None else Path(tissue_dir)
        self.settings = {"tile_size": tile_size, "mpp": mpp, "nuclei_mpp": nuclei_mpp, "device": device}
        self.num_workers, self.progress = num_workers, progress

    def run(self) -> RunReport:
        """Import the slides and print the summary; a slide that fails is reported, the others go on."""
        records = read_slide_table(self.slides)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        report = RunReport("import tiles", self.output_dir / "report.csv")
        work = partial(
            _import_to_file,
            folder=self.output_dir,
            coords_dir=self.coords_dir,
            tissue_dir=self.tissue_dir,
            settings=self.settings,
        )
        for outcome in run_parallel(work, list(records), self.num_workers, "import tiles", self.progress):
            if outcome.error is not None:
                report.add(outcome.item.slide_id, "failed", failure(outcome.error))
            else:
                report.add(outcome.item.slide_id, *outcome.unwrap())
        report.save()
        print(report.summary(), flush=True)
        return report


def _import_to_file(
    record: SlideRecord, folder: Path, coords_dir: Path | None, tissue_dir: Path | None, settings: Mapping[str, Any]
) -> tuple[Literal["done"], str, float]:
    start = time.perf_counter()
    coords = _file_of(record, coords_dir, ("_patches.h5", ".h5"))
    tissue = _file_of(record, tissue_dir, (".geojson", ".json", ".png", ".tif", ".tiff"))
    index = import_index(record, coords, tissue, **settings)
    index.write(folder / f"{record.slide_id}.parquet")
    return "done", f"{len(index)} tiles, {index.meta['nuclei']} nuclei", time.perf_counter() - start


def _file_of(record: SlideRecord, folder: Path | None, endings: tuple[str, ...]) -> Path | None:
    if folder is None:
        return None
    for name in dict.fromkeys((record.slide_id, record.path.stem)):
        for ending in endings:
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    raise TableError(f"{folder}: no file of {record.slide_id} ({record.path.stem}{', '.join(endings)})")
