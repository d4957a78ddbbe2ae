"""Nuclei that another program found: instance maps, masks, and the GeoJSON that QuPath exports.

HoVerNet, Cellpose and StarDist write instance maps (``.npy`` or images), and so does everything that speaks MONAI;
QuPath writes polygons in pixels of the whole slide. Either becomes what ``SegmentNuclei`` gives, so that perturbation,
crops and views need not know where nuclei come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import ensure_tuple_rep
from numpy.typing import ArrayLike, NDArray
from skimage.draw import polygon
from skimage.io import imread
from skimage.measure import label

from cytossl_monai.transforms.nuclei import as_output, check_image, check_mpp
from cytossl_monai.transforms.nuclei_table import NucleiInstances, describe_nuclei
from cytossl_monai.utils.errors import InputError

__all__ = ["LoadNuclei", "LoadNucleiD", "LoadNucleiDict", "LoadNucleid", "labels_from_geojson", "labels_from_map"]

Source = str | os.PathLike[str] | ArrayLike | torch.Tensor | Mapping[str, Any]


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


def _rings(feature: Any, name: str) -> Iterator[list[NDArray[np.float64]]]:
    """The polygons of a feature, each as its outer ring and its holes, (n, 2) x, y."""
    geometry = feature.get("nucleusGeometry") or feature.get("geometry") if isinstance(feature, Mapping) else None
    kind = geometry.get("type") if isinstance(geometry, Mapping) else None
    if kind not in ("Polygon", "MultiPolygon"):
        return  # points and lines of annotations have no area
    assert isinstance(geometry, Mapping)
    parts = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
    for part in parts:
        rings = [np.asarray(ring, dtype=np.float64) for ring in part]
        if not rings or any(ring.ndim != 2 or ring.shape[1] < 2 for ring in rings):
            raise InputError(f"{name} holds a {kind} whose rings are no lists of x, y; export it from QuPath again.")
        yield [ring[:, :2] for ring in rings]


def labels_from_geojson(
    source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any],
    shape: tuple[int, int],
    origin: tuple[float, float] = (0.0, 0.0),
    downsample: float = 1.0,
) -> NDArray[np.int32]:
    """Draw the polygons of a GeoJSON, as QuPath exports them, into the instance map of a tile.

    Cells that QuPath detected carry the outline of their nucleus beside that of the cell (``nucleusGeometry``): the
    nucleus is taken. Where polygons overlap, the later one wins.

    Args:
        source: a file, or what it holds: a FeatureCollection, a feature, or a list of features.
        shape: (H, W) of the tile in pixels.
        origin: x, y of the tile's top-left corner in the polygons' pixels (level 0 of the slide).
        downsample: pixels of level 0 to one pixel of the tile.

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
        try:
            content = json.loads(Path(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{name} cannot be read ({error.strerror}); give a GeoJSON file.") from error
        except ValueError as error:
            raise InputError(f"{name} is no JSON ({error}); export it from QuPath as GeoJSON.") from error
    features = content.get("features", [content]) if isinstance(content, Mapping) else content
    if not isinstance(features, Sequence) or isinstance(features, str):
        raise InputError(f"{name} is no GeoJSON: it holds no features; export objects from QuPath as GeoJSON.")
    labels = np.zeros(shape, dtype=np.int32)
    for number, feature in enumerate(features, start=1):
        for rings in _rings(feature, name):
            inside = np.zeros(shape, dtype=bool)
            for index, ring in enumerate(rings):
                # A pixel is covered where its centre is: that of pixel 0 lies at 0.5.
                columns, rows = ((ring - np.asarray(origin)) / downsample - 0.5).T
                inside[polygon(rows, columns, shape)] = index == 0
            labels[inside] = number
    return _numbered(labels)


class LoadNuclei(Transform):
    """Nuclei from elsewhere, as ``SegmentNuclei`` would give them.

    Args:
        mpp: micrometres per pixel of the tiles; needed for ``output="all"`` alone.
        output: ``"mask"``, ``"labels"`` or ``"all"``, see ``SegmentNuclei``.

    Raises:
        ValueError: unknown output, ``mpp`` not positive.
    """

    def __init__(self, mpp: float | None = None, output: Literal["mask", "labels", "all"] = "mask") -> None:
        if output not in ("mask", "labels", "all"):
            raise ValueError(f"output is {output!r}; it must be 'mask', 'labels' or 'all'.")
        self.mpp = None if mpp is None else check_mpp(mpp)
        self.output = output

    def __call__(
        self,
        source: Source,
        img: NdarrayOrTensor,
        mpp: float | None = None,
        origin: tuple[float, float] = (0.0, 0.0),
        downsample: float = 1.0,
    ) -> NdarrayOrTensor | NucleiInstances:
        """Bring the nuclei of one tile.

        Args:
            source: an instance map or mask, (H, W) or (1, H, W); a file of one (``.npy``, or an image); or GeoJSON, as
                a file (``.geojson`` or ``.json``) or as what it holds.
            img: the tile that they belong to, (C, H, W): gives the size, and the kind of what comes out.
            mpp: micrometres per pixel, in place of the transform's own.
            origin: of a GeoJSON, see ``labels_from_geojson``.
            downsample: of a GeoJSON, see ``labels_from_geojson``.

        Returns:
            as ``SegmentNuclei``.

        Raises:
            ValueError: the map has another size than the tile, or cannot be read.
        """
        return self._give(self.labels(source, img, origin, downsample), img, mpp)

    def labels(
        self,
        source: Source,
        img: NdarrayOrTensor,
        origin: tuple[float, float] = (0.0, 0.0),
        downsample: float = 1.0,
        name: str = "mask",
    ) -> NDArray[np.int32]:
        """Instance labels, int32 (H, W); arguments as of a call, ``name`` is what messages call the source."""
        shape = (int(img.shape[-2]), int(img.shape[-1]))
        if isinstance(source, Mapping):
            return labels_from_geojson(source, shape, origin, downsample)
        if isinstance(source, (str, os.PathLike)):
            path = Path(source)
            if path.suffix.lower() in (".geojson", ".json"):
                return labels_from_geojson(path, shape, origin, downsample)
            try:
                source = np.load(path) if path.suffix.lower() == ".npy" else imread(path)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{path} cannot be read as an instance map ({error}); give .npy or an image."
                ) from error
            name = str(path)
        found = labels_from_map(cast(Any, source), name)
        if found.shape != shape:
            raise ValueError(f"{name} has the size {found.shape}; the tile has {shape}.")
        return found

    def _give(self, labels: NDArray[np.int32], img: NdarrayOrTensor, mpp: Any) -> NdarrayOrTensor | NucleiInstances:
        if self.output == "all":
            scale = check_mpp(self.mpp if mpp is None else mpp)
            return NucleiInstances(labels, describe_nuclei(labels, scale, check_image(img)), scale)
        return as_output(labels if self.output == "labels" else (labels > 0).astype(np.uint8), img)


class LoadNucleid(MapTransform):
    """Dictionary twin of ``LoadNuclei``; what it writes is what ``SegmentNucleid`` writes.

    Args:
        keys: where the nuclei from elsewhere are: maps, files, or GeoJSON.
        image_key: the tile that they belong to.
        mask_keys: where each mask goes.
        labels_keys: where each instance map goes, int32 (1, H, W); None leaves it out.
        x_key: of a GeoJSON, the tile's left border in level-0 pixels, 0 where absent; with ``y_key`` and ``size_key``
            the columns of a tile index.
        y_key: the tile's upper border.
        size_key: side of the tile in level-0 pixels; where absent a pixel of the tile is one of level 0.
        allow_missing_keys: leave absent keys alone.

    Raises:
        ValueError: the map has another size than the tile, or cannot be read; the message names the key.
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_key: str = "image",
        mask_keys: KeysCollection = "nuclei",
        labels_keys: KeysCollection | None = None,
        x_key: str = "x",
        y_key: str = "y",
        size_key: str = "size",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load = LoadNuclei()
        self.image_key = image_key
        self.mask_keys = ensure_tuple_rep(mask_keys, len(self.keys))
        self.labels_keys = ensure_tuple_rep(labels_keys, len(self.keys))
        self.x_key, self.y_key, self.size_key = x_key, y_key, size_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the mask (and instance map) of each key to a copy of ``data``."""
        result = dict(data)
        if self.image_key not in result:
            raise ValueError(f"{self.image_key} is missing; this dictionary has {sorted(map(str, result))}.")
        image = result[self.image_key]
        origin = (float(result.get(self.x_key, 0.0)), float(result.get(self.y_key, 0.0)))
        downsample = float(result[self.size_key]) / image.shape[-1] if self.size_key in result else 1.0
        for key, mask_key, labels_key in self.key_iterator(result, self.mask_keys, self.labels_keys):
            try:
                labels = self.load.labels(result[key], image, origin, downsample)
            except ValueError as error:
                raise ValueError(f"Key {key!r}: {error}") from error
            result[mask_key] = as_output((labels > 0).astype(np.uint8), image)
            if labels_key is not None:
                result[labels_key] = as_output(labels, image)
        return result


LoadNucleiD = LoadNucleiDict = LoadNucleid
