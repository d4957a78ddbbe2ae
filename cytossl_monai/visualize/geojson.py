"""Tiles as GeoJSON that QuPath opens: names, colours and measurements on every object."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cytossl_monai.utils.files import write_text
from cytossl_monai.visualize.gallery import GalleryTile
from cytossl_monai.visualize.heatmap import colours

__all__ = ["feature_collection", "write_geojson"]

_SPACE = uuid.UUID("6e0c4a3e-7c1b-5d0c-9a8e-3a5b1c6d7e8f")
_TOP_COLOUR = (220, 30, 60)
_NUCLEUS_COLOUR = (0, 160, 80)
_LEVELS = 5
_MEASURED = {
    "area_um2": "Area µm^2",
    "diameter_um": "Diameter µm",
    "eccentricity": "Eccentricity",
    "solidity": "Solidity",
    "mean_od": "Optical density",
    "nucleus_to_foreground": "Nucleus to foreground",
}
"""Column of the table of nuclei to name in QuPath."""


def feature_collection(
    slide_id: str,
    coords: np.ndarray,
    size: int,
    shown: np.ndarray,
    measurements: Mapping[str, np.ndarray],
    top: np.ndarray,
    gallery: Sequence[GalleryTile] = (),
    bounds_offset: tuple[int, int] = (0, 0),
    cells: bool = False,
) -> dict[str, Any]:
    """Every tile as a QuPath tile object, the leading ones as named annotations, and their nuclei as detections.

    Args:
        slide_id: goes into the objects' ids, so that importing twice replaces.
        coords: (N, 2) x, y of the tiles' corners, level-0 pixels.
        size: side of a tile, level-0 pixels.
        shown: (N,) in [0, 1], for the colours.
        measurements: name to (N,) numbers.
        top: row numbers of the leading tiles, best first.
        gallery: the leading tiles with their nuclei.
        bounds_offset: x, y of the scanned part within level 0: QuPath crops a slide to it (MRXS) and counts from it.
        cells: the tiles are fields centred on a nucleus each: they become QuPath detections, a square of a third of the
            field's side where the cell is, and the leading ones are named cells.

    Returns:
        a GeoJSON FeatureCollection with QuPath's properties.
    """
    level = np.minimum((np.asarray(shown) * _LEVELS).astype(int), _LEVELS - 1)
    palette = colours((np.arange(_LEVELS) + 0.5) / _LEVELS)
    told = [{name: float(values[i]) for name, values in measurements.items()} for i in range(len(coords))]
    features = [
        _feature(
            f"{slide_id}/{'cell' if cells else 'tile'}/{x}/{y}/{size}",
            _square(x + size // 3, y + size // 3, size // 3) if cells else _square(x, y, size),
            "detection" if cells else "tile",
            (f"Evidence {level[i] + 1} of {_LEVELS}", palette[level[i]]),
            told[i],
        )
        for i, (x, y) in enumerate(np.asarray(coords).tolist())
    ]
    for rank, i in enumerate(top, 1):
        x, y = (int(v) for v in coords[i])
        features.append(
            _feature(
                f"{slide_id}/annotation/{x}/{y}/{size}",
                _square(x, y, size),
                "annotation",
                ("Leading cell" if cells else "Leading tile", _TOP_COLOUR),
                {"Rank": float(rank), **told[int(i)]},
                f"Top {rank}",
            )
        )
    for tile in gallery:
        features += _nuclei(slide_id, tile)
    if any(bounds_offset):
        for feature in features:
            rings = feature["geometry"]["coordinates"]
            rings[0] = [[x - bounds_offset[0], y - bounds_offset[1]] for x, y in rings[0]]
    return {"type": "FeatureCollection", "features": features}


def _square(x: int, y: int, size: int) -> list[list[float]]:
    return [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]


def _nuclei(slide_id: str, tile: GalleryTile) -> list[dict[str, Any]]:
    scale = tile.size / tile.image.shape[-1]  # level-0 pixels per pixel of the picture
    found = []
    measured = tile.nuclei[list(_MEASURED)].to_numpy(dtype=np.float64)
    for number, (values, contour) in enumerate(zip(measured, tile.contours)):
        ring = np.round(contour * scale + (tile.x, tile.y), 1)
        if not np.array_equal(ring[0], ring[-1]):
            ring = np.concatenate([ring, ring[:1]])
        if len(ring) < 4:
            continue
        found.append(
            _feature(
                f"{slide_id}/nucleus/{tile.x}/{tile.y}/{number}",
                ring.tolist(),
                "detection",
                ("Nucleus", _NUCLEUS_COLOUR),
                {name: round(float(v), 4) for name, v in zip(_MEASURED.values(), values) if np.isfinite(v)},
            )
        )
    return found


def _feature(
    key: str,
    ring: list[list[float]],
    kind: str,
    label: tuple[str, Any],
    measurements: dict[str, float],
    name: str | None = None,
) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "objectType": kind,
        "classification": {"name": label[0], "color": [int(c) for c in label[1]]},
        "measurements": measurements,
        "isLocked": True,
    }
    if name is not None:
        properties["name"] = name
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_SPACE, key)),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": properties,
    }


def write_geojson(path: str | os.PathLike[str], collection: dict[str, Any]) -> Path:
    """Write a FeatureCollection, atomically."""
    # One line: a slide has tens of thousands of tiles, and indentation would double the file.
    write_text(path, json.dumps(collection, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n")
    return Path(path)
