"""Nuclei as dictionary transforms; see `array`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import ensure_tuple_rep
from numpy.typing import NDArray

from cytossl_monai.transforms.kernels.checks import stated_mpp
from cytossl_monai.transforms.nuclei.array import LoadNuclei, SegmentNuclei
from cytossl_monai.transforms.nuclei.instances import as_output
from cytossl_monai.transforms.nuclei.regions import RegionRules

__all__ = ["LoadNucleiD", "LoadNucleiDict", "LoadNucleid", "SegmentNucleiD", "SegmentNucleiDict", "SegmentNucleid"]


class SegmentNucleid(MapTransform):
    """Dictionary twin of ``SegmentNuclei``.

    Args:
        keys: images to segment.
        mask_keys: where each mask goes; one name, or one for each key.
        labels_keys: where each instance map goes, int32 (1, H, W); None leaves it out.
        table_keys: where each table goes, a pandas DataFrame; None leaves it out. (MONAI's default collate cannot batch
            it: take it out before a DataLoader.)
        mpp: micrometres per pixel; None takes the MetaTensor's own ``meta["mpp"]``, then ``data[mpp_key]``.
        mpp_key: key of the sample's micrometres per pixel.
        method: see ``SegmentNuclei``.
        stains: see ``SegmentNuclei``.
        rules: see ``SegmentNuclei``.
        allow_missing_keys: leave absent keys alone.

    Raises:
        ValueError: ``mpp`` is known from nowhere, or an image is unusable; the message names the key.
    """

    def __init__(
        self,
        keys: KeysCollection,
        mask_keys: KeysCollection = "nuclei",
        labels_keys: KeysCollection | None = None,
        table_keys: KeysCollection | None = None,
        mpp: float | None = None,
        mpp_key: str = "mpp",
        method: Literal["instances", "mask"] = "instances",
        stains: str | NDArray[Any] | None = None,
        rules: RegionRules | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.segment = SegmentNuclei(mpp=mpp, method=method, stains=stains, rules=rules)
        self.mpp_key = mpp_key
        self.mask_keys = ensure_tuple_rep(mask_keys, len(self.keys))
        self.labels_keys = ensure_tuple_rep(labels_keys, len(self.keys))
        self.table_keys = ensure_tuple_rep(table_keys, len(self.keys))
        for name in (self.mask_keys, self.labels_keys, self.table_keys):
            given = [key for key in name if key is not None]
            if len(set(given)) < len(given):
                raise ValueError(f"Two images would write to the same key {given}; name one output key for each.")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add mask (and instance map, and table) of each image to a copy of ``data``."""
        result = dict(data)
        for key, mask_key, labels_key, table_key in self.key_iterator(
            result, self.mask_keys, self.labels_keys, self.table_keys
        ):
            mpp = stated_mpp(self.segment.mpp, result[key], result.get(self.mpp_key))
            try:
                found = self.segment.find(result[key], mpp, table=table_key is not None)
            except ValueError as error:
                raise ValueError(f"Key {key!r}: {error}") from error
            result[mask_key] = as_output(found.mask.astype(np.uint8), result[key])
            if labels_key is not None:
                result[labels_key] = as_output(found.labels, result[key])
            if table_key is not None:
                result[table_key] = found.table
        return result


SegmentNucleiD = SegmentNucleiDict = SegmentNucleid


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
        bounds_key: of a GeoJSON of QuPath, x, y of the scanned part (``Slide.bounds_offset``, also in the metadata of
            tile indexes), from which QuPath counts in MRXS slides; 0, 0 where absent.
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
        bounds_key: str = "bounds_offset",
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load = LoadNuclei()
        self.image_key = image_key
        self.mask_keys = ensure_tuple_rep(mask_keys, len(self.keys))
        self.labels_keys = ensure_tuple_rep(labels_keys, len(self.keys))
        self.x_key, self.y_key, self.size_key, self.bounds_key = x_key, y_key, size_key, bounds_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the mask (and instance map) of each key to a copy of ``data``."""
        result = dict(data)
        if self.image_key not in result:
            raise ValueError(f"{self.image_key} is missing; this dictionary has {sorted(map(str, result))}.")
        image = result[self.image_key]
        origin = (float(result.get(self.x_key, 0.0)), float(result.get(self.y_key, 0.0)))
        left, top = (float(each) for each in result.get(self.bounds_key, (0.0, 0.0)))
        downsample = float(result[self.size_key]) / image.shape[-1] if self.size_key in result else 1.0
        for key, mask_key, labels_key in self.key_iterator(result, self.mask_keys, self.labels_keys):
            try:
                labels = self.load.labels(result[key], image, origin, downsample, (left, top))
            except ValueError as error:
                raise ValueError(f"Key {key!r}: {error}") from error
            result[mask_key] = as_output((labels > 0).astype(np.uint8), image)
            if labels_key is not None:
                result[labels_key] = as_output(labels, image)
        return result


LoadNucleiD = LoadNucleiDict = LoadNucleid
