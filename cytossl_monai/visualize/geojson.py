"""Tiles as GeoJSON that QuPath opens: names, colours and measurements on every object."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from cytossl_monai.utils.files import write_json
from cytossl_monai.visualize.heatmap import colours

__all__ = ["feature_collection", "write_geojson"]

_SPACE = uuid.UUID("6e0c4a3e-7c1b-5d0c-9a8e-3a5b1c6d7e8f")
_TOP_COLOUR = (220, 30, 60)


def feature_collection(
    slide_id: str,
    coords: np.ndarray,
    size: int,
    shown: np.ndarray,
    measurements: dict[str, np.ndarray],
    top: np.ndarray,
) -> dict[str, Any]:
    """Every tile as a QuPath tile object, and the leading ones as named annotations above them.

    Args:
        slide_id: goes into the objects' ids, so that importing twice replaces.
        coords: (N, 2) x, y of the tiles' corners, level-0 pixels.
        size: side of a tile, level-0 pixels.
        shown: (N,) in [0, 1], for the colours.
        measurements: name to (N,) numbers.
        top: row numbers of the leading tiles, best first.

    Returns:
        a GeoJSON FeatureCollection with QuPath's properties.
    """
    bins = np.minimum((np.asarray(shown) * 5).astype(int), 4)
    palette = colours((np.arange(5) + 0.5) / 5)
    features = [
        _feature(slide_id, i, coords[i], size, "tile", f"Attention {bins[i] + 1} of 5", palette[bins[i]], measurements)
        for i in range(len(coords))
    ]
    for rank, i in enumerate(top, 1):
        features.append(
            _feature(
                slide_id,
                int(i),
                coords[i],
                size,
                "annotation",
                "Leading tile",
                _TOP_COLOUR,
                measurements,
                f"Top {rank}",
            )
        )
    return {"type": "FeatureCollection", "features": features}


def _feature(
    slide_id: str,
    row: int,
    corner: np.ndarray,
    size: int,
    kind: str,
    label: str,
    colour: Any,
    measurements: dict[str, np.ndarray],
    name: str | None = None,
) -> dict[str, Any]:
    x, y = (int(v) for v in corner)
    ring = [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]
    properties: dict[str, Any] = {
        "objectType": kind,
        "classification": {"name": label, "color": [int(c) for c in colour]},
        "measurements": {key: float(values[row]) for key, values in measurements.items()},
        "isLocked": True,
    }
    if name is not None:
        properties["name"] = name
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_SPACE, f"{slide_id}/{kind}/{x}/{y}/{size}")),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": properties,
    }


def write_geojson(path: str | os.PathLike[str], collection: dict[str, Any]) -> Path:
    """Write a FeatureCollection, atomically."""
    write_json(path, collection)
    return Path(path)
