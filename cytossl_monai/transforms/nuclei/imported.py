"""Nuclei that another program found: instance maps, masks, and the GeoJSON that QuPath exports.

HoVerNet, Cellpose and StarDist write instance maps (``.npy`` or images), and so does everything that speaks MONAI;
QuPath writes polygons in pixels of the whole slide. Either becomes what ``SegmentNuclei`` gives, so that perturbation,
crops and views need not know where nuclei come from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from skimage.draw import polygon
from skimage.measure import label

from cytossl_monai.utils.errors import InputError
from cytossl_monai.utils.files import read_json

__all__ = ["classified_places", "labels_from_geojson", "labels_from_map", "nuclei_from_geojson"]

_GEOMETRIES = frozenset(
    {"Polygon", "MultiPolygon", "GeometryCollection", "Point", "MultiPoint", "LineString", "MultiLineString"}
)
_NO_NUCLEI = frozenset({"annotation", "tile", "tma_core", "core", "root", "pathannotationobject", "pathtileobject"})
"""What QuPath calls objects that are no detections."""


def labels_from_map(instances: ArrayLike | torch.Tensor, name: str = "mask") -> NDArray[np.int32]:
    """An instance map or a binary mask as instance labels.

    Args:
        instances: (H, W) or (1, H, W). Whole numbers are instances, 0 is background. A mask of bool, of 0 and 1, or of
            0 and 255 is cut into its 8-connected components.
        name: what to call it in messages.

    Returns:
        int32 (H, W), numbered 1..n without gaps.

    Raises:
        ValueError: another shape, fractions, or negative numbers.
    """
    array = np.asarray(instances.detach().cpu() if isinstance(instances, torch.Tensor) else instances)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2:
        raise ValueError(f"{name} has the shape {array.shape}; allowed is (H, W) or (1, H, W).")
    if array.dtype.kind not in "buif" or not np.array_equal(array, np.floor(array)) or array.min(initial=0) < 0:
        raise ValueError(f"{name} holds {array.dtype} that are no whole numbers >= 0; allowed are instances or a mask.")
    values = np.unique(array)
    if values.size and float(values[-1]) in (1.0, 255.0) and set(values.tolist()) <= {0, values[-1]}:
        return np.asarray(label(array > 0, connectivity=2), dtype=np.int32)
    return _numbered(array)


def _numbered(array: NDArray[Any]) -> NDArray[np.int32]:
    """The same regions, numbered 1..n without gaps."""
    values, inverse = np.unique(array, return_inverse=True)
    return (inverse.reshape(array.shape) + (0 if values.size and values[0] == 0 else 1)).astype(np.int32)


def _objects(content: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """The objects that GeoJSON holds: features, or bare geometries as if they were features.

    Raises:
        InputError: it holds neither.
    """
    if isinstance(content, Mapping):
        kind = content.get("type")
        if kind == "FeatureCollection":
            content = content.get("features")
        elif kind == "Feature" or kind in _GEOMETRIES:
            content = [content]
    if not isinstance(content, Sequence) or isinstance(content, str):
        what = ", ".join(sorted(map(str, content))[:5]) if isinstance(content, Mapping) else type(content).__name__
        raise InputError(
            f"{name} is no GeoJSON: it holds no features ({what[:80]}); export objects from QuPath as GeoJSON."
        )
    for item in content:
        if not isinstance(item, Mapping) or (item.get("type") != "Feature" and item.get("type") not in _GEOMETRIES):
            raise InputError(
                f"{name} is no GeoJSON: one of its objects is {str(item)[:60]!r}; export it from QuPath again."
            )
        yield item if item.get("type") == "Feature" else {"geometry": item}


def _is_annotation(feature: Mapping[str, Any]) -> bool:
    """Whether QuPath calls the object something other than a nucleus: the annotation around them, a tile, a core."""
    properties = feature.get("properties")
    kind = properties.get("objectType", properties.get("object_type")) if isinstance(properties, Mapping) else None
    return isinstance(kind, str) and kind.lower().removeprefix("pathology_") in _NO_NUCLEI


def _polygons(geometry: Any, name: str) -> Iterator[list[NDArray[np.float64]]]:
    """The polygons of a geometry, each as its outer ring and its holes, (n, 2) x, y; empty ones are left out."""
    kind = geometry.get("type") if isinstance(geometry, Mapping) else None
    if kind == "GeometryCollection":
        parts = geometry.get("geometries")
        for part in parts if isinstance(parts, Sequence) else ():
            yield from _polygons(part, name)
        return
    if kind not in ("Polygon", "MultiPolygon"):
        return  # points and lines have no area
    assert isinstance(geometry, Mapping)
    coordinates = geometry.get("coordinates")
    broken = InputError(f"{name} holds a {kind} whose rings are no lists of x, y; export it from QuPath again.")
    if not isinstance(coordinates, Sequence) or isinstance(coordinates, str):
        raise broken
    for part in [coordinates] if kind == "Polygon" else coordinates:
        try:
            rings = [np.asarray(ring, dtype=np.float64) for ring in part]
        except (TypeError, ValueError) as error:
            raise broken from error
        rings = [ring for ring in rings if ring.size]
        if any(ring.ndim != 2 or ring.shape[1] < 2 or not np.isfinite(ring).all() for ring in rings):
            raise broken
        if rings:
            yield [ring[:, :2] for ring in rings]


def _points(geometry: Any, name: str) -> Iterator[NDArray[np.float64]]:
    """The points of a geometry, (n, 2) x, y each time."""
    kind = geometry.get("type") if isinstance(geometry, Mapping) else None
    if kind == "GeometryCollection":
        parts = geometry.get("geometries")
        for part in parts if isinstance(parts, Sequence) else ():
            yield from _points(part, name)
    if kind not in ("Point", "MultiPoint"):
        return
    try:
        places = np.asarray(geometry.get("coordinates"), dtype=np.float64)
        places = places[None] if kind == "Point" else places.reshape(-1, places.shape[-1])
        if places.shape[1] < 2 or not np.isfinite(places).all():
            raise ValueError("no x, y")
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{name} holds a {kind} that is no list of x, y; write it again with the detector.") from error
    yield places[:, :2]


def nuclei_from_geojson(content: Any, name: str) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
    """The nuclei of a GeoJSON, as `labels_from_geojson` takes them, without drawing them.

    Args:
        content: what the file holds.
        name: what messages call it.

    Returns:
        The outer rings of the polygons, (n, 2) x and y each, and (P, 2) the points of objects that are points.

    Raises:
        InputError: it is no GeoJSON, or a geometry in it is malformed.
    """
    objects = list(_objects(content, name))
    detections = [one for one in objects if not _is_annotation(one)]
    outlines: list[NDArray[np.float64]] = []
    points: list[NDArray[np.float64]] = []
    for feature in detections or objects:
        geometry = feature.get("nucleusGeometry") or feature.get("geometry")
        outlines += [rings[0] for rings in _polygons(geometry, name) if len(rings[0]) >= 3]
        points += list(_points(geometry, name))
    return outlines, np.concatenate(points) if points else np.zeros((0, 2))


def classified_places(content: Any, name: str) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Where the classified objects of a GeoJSON lie, as QuPath exports what was marked in it.

    Args:
        content: what the file holds.
        name: what messages call it.

    Yields:
        The class, and (n, 2) x and y: points, and the middles of outlines (of the nucleus, where there is one). Objects
        without a class are passed over.

    Raises:
        InputError: it is no GeoJSON, or a geometry in it is malformed.
    """
    for feature in _objects(content, name):
        properties = feature.get("properties")
        kind = properties.get("classification") if isinstance(properties, Mapping) else None
        kind = kind.get("name") if isinstance(kind, Mapping) else kind
        if not isinstance(kind, str) or not kind.strip():
            continue
        geometry = feature.get("nucleusGeometry") or feature.get("geometry")
        middles = [(rings[0].min(axis=0) + rings[0].max(axis=0))[:2] / 2 for rings in _polygons(geometry, name)]
        places = [*_points(geometry, name), *([np.array(middles)] if middles else [])]
        if places:
            yield kind.strip(), np.concatenate(places)


def labels_from_geojson(
    source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any],
    shape: tuple[int, int],
    origin: tuple[float, float] = (0.0, 0.0),
    downsample: float = 1.0,
    bounds_offset: tuple[float, float] = (0.0, 0.0),
) -> NDArray[np.int32]:
    """Draw the polygons of a GeoJSON, as QuPath exports them, into the instance map of a tile.

    Cells that QuPath detected carry the outline of their nucleus beside that of the cell (``nucleusGeometry``): the
    nucleus is taken. Objects that QuPath calls annotations, tiles or cores are no nuclei, where the file holds
    detections too. Each polygon is an instance, also in the MultiPolygon of a class that CellViT writes. Where polygons
    overlap, the later one wins.

    QuPath crops slides with an ``openslide.bounds-x`` (MRXS) and counts from the scanned part: ``bounds_offset`` says
    where that begins. `feature_collection` takes the same off again, so what goes out and comes back lies where it was.

    Args:
        source: a file, or what it holds: a FeatureCollection, a feature, a geometry, or a list of them.
        shape: (H, W) of the tile in pixels.
        origin: x, y of the tile's top-left corner in the polygons' pixels (level 0 of the slide).
        downsample: pixels of level 0 to one pixel of the tile.
        bounds_offset: x, y of the scanned part within level 0, ``Slide.bounds_offset``, where the polygons count from
            it; 0, 0 where they count from level 0, as CellViT's and TRIDENT's do.

    Returns:
        int32 (H, W), 0 is background, 1..n the nuclei that show in the tile.

    Raises:
        InputError: the file is absent, is no GeoJSON, or a polygon in it is malformed.
        ValueError: ``downsample`` is not positive.
    """
    if not downsample > 0:
        raise ValueError(f"downsample is {downsample}; it must be positive: level-0 pixels to a pixel of the tile.")
    name = "The GeoJSON"
    content: Any = source
    if isinstance(source, (str, os.PathLike)):
        name = str(source)
        content = read_json(source, "export it from QuPath as GeoJSON")
    objects = list(_objects(content, name))
    nuclei = [one for one in objects if not _is_annotation(one)]
    labels = np.zeros(shape, dtype=np.int32)
    number = 0
    corner = np.asarray(origin, dtype=np.float64) - np.asarray(bounds_offset, dtype=np.float64)
    # A file of annotations alone: somebody outlined the nuclei by hand.
    for feature in nuclei or objects:
        for rings in _polygons(feature.get("nucleusGeometry") or feature.get("geometry"), name):
            number += 1
            inside = np.zeros(shape, dtype=bool)
            for index, ring in enumerate(rings):
                # A pixel is covered where its centre is: that of pixel 0 lies at 0.5.
                columns, rows = ((ring - corner) / downsample - 0.5).T
                inside[polygon(rows, columns, shape)] = index == 0
            labels[inside] = number
    return _numbered(labels)
