"""The feature store: one HDF5 file a slide, in the form that CLAM and TRIDENT read and write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from cytossl_monai.data.bags.attributes import plain_attributes
from cytossl_monai.utils.errors import FeatureError
from cytossl_monai.utils.files import atomic_path, encodable

__all__ = ["Features", "read_feature_attrs", "read_features", "write_features"]

FORMAT = "cytossl-features"
VERSION = 1

NO_PLACE = -1
"""Coordinate of a tile of which the file does not say where it lies."""

_MAX_COORD = 1 << 40
_SMALL_BYTES = 1 << 30
_MOST_COMPRESSED = 1000


@dataclass(frozen=True)
class Features:
    """What a feature file holds.

    Args:
        features: (N, D) float32, one row a tile.
        coords: (N, 2) int64, x and y of the tile's top-left corner in level-0 pixels; -1 where the file says nothing
            (features without coordinates, or of a whole slide).
        attrs: the file's attributes, among them ``encoder``, ``patch_size``, ``patch_size_level0``, ``level0_mpp``.
    """

    features: np.ndarray
    coords: np.ndarray
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def encoder(self) -> str | None:
        """Hash of the encoder that made the features; None in files from elsewhere that do not say."""
        value = self.attrs.get("encoder")
        return None if value is None else str(value)

    def __len__(self) -> int:
        return len(self.features)


def write_features(
    path: str | os.PathLike[str],
    features: np.ndarray,
    coords: np.ndarray,
    attrs: Mapping[str, Any],
    dtype: Literal["float32", "float16"] = "float32",
) -> Path:
    """Write one slide's features, atomically.

    Two datasets, ``features`` (N, D) and ``coords`` (N, 2). The attributes go on the file and on ``coords``, where CLAM
    and TRIDENT look for them. Where ``patch_size``, ``mpp`` and ``level0_mpp`` are given and ``patch_size_level0``
    (TRIDENT's name for the side of a tile in level-0 pixels) is not, it is worked out.

    Args:
        path: the HDF5 file.
        features: (N, D), finite, N >= 1.
        coords: (N, 2) integers, x and y of each tile's top-left corner in level-0 pixels.
        attrs: text, numbers, truth values or short sequences of them; None is left out.
        dtype: how the features are stored. float16 halves the file; they are read back as float32.

    Returns:
        the path written.

    Raises:
        FeatureError: when there is no tile, the shapes do not belong together, a feature is not finite, or float16
            cannot hold one.
    """
    path = Path(path)
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be 'float32' or 'float16', not {dtype!r}")
    values, places = np.asarray(features), np.asarray(coords)
    if values.ndim != 2 or places.shape != (len(values), 2):
        raise FeatureError(
            f"features for {path} must be (N, D) with coords (N, 2), not {values.shape} with {places.shape}"
        )
    if values.dtype.kind not in "iuf":
        raise FeatureError(f"features for {path} are of the type {values.dtype}, not real numbers")
    if not len(values):
        raise FeatureError(f"no tile to write to {path}: the slide has an empty bag; leave the slide out")
    if not np.issubdtype(places.dtype, np.integer) and not np.array_equal(places, np.rint(places)):
        raise FeatureError(f"coords for {path} must be whole level-0 pixels")
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        why = "a value beyond float16; write float32" if np.isfinite(values).all() else "a NaN or infinite value"
        raise FeatureError(f"features for {path} hold {why}")
    full = {key: value for key, value in attrs.items() if value is not None}
    if {"patch_size", "mpp", "level0_mpp"} <= full.keys():
        full.setdefault("patch_size_level0", round(full["patch_size"] * full["mpp"] / full["level0_mpp"]))
    full = {"format": FORMAT, "version": VERSION, **full}
    with atomic_path(path) as partial, h5py.File(partial, "w") as file:
        file.create_dataset("features", data=stored)
        file.create_dataset("coords", data=places.astype(np.int64))
        for key, value in full.items():
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            value = encodable(value) if isinstance(value, str) else value
            file.attrs[key] = value
            file["coords"].attrs[key] = value
    return path


def read_features(path: str | os.PathLike[str], encoder: str | None = None) -> Features:
    """Read one slide's features; files of CLAM, TRIDENT and STAMP are read as well.

    STAMP's dataset is ``feats`` and its coordinates are micrometres: they are taken as pixels of 1 um (``level0_mpp``).
    Files without ``coords`` are read for MIL, and features (D,) of a whole slide are a bag of one.

    Args:
        path: the HDF5 file.
        encoder: hash that the features must have been made by; None takes any.

    Returns:
        the features as float32, their places and the attributes (of ``features``, ``coords`` and the file, the
        latter counting where names meet).

    Raises:
        FeatureError: when the file is missing, damaged, of another form, without a tile, not finite, or made by another
            encoder, or when a known attribute is of another kind or out of range.
    """
    path = Path(path)
    with _opened(path) as file:
        stored, placed = _datasets(file, path)
        try:
            features = np.asarray(stored[()], dtype=np.float32)
            coords = None if placed is None else np.asarray(placed[()])
        except (KeyError, OSError, ValueError, TypeError, RuntimeError) as error:
            raise FeatureError(f"feature file {path} cannot be read ({error}); make it again") from error
        attrs = _attributes(file, stored, placed, path)
    features = features.reshape(_bag_shape(features.shape))
    if coords is None:
        coords = np.full((len(features), 2), NO_PLACE, np.int64)
    if coords.shape != (len(features), 2):
        raise FeatureError(
            f"feature file {path} holds features {features.shape} and coords {coords.shape}, not (N, D) and (N, 2); "
            "make it again"
        )
    if not np.isfinite(coords).all() or (np.abs(coords) > _MAX_COORD).any():
        raise FeatureError(f"feature file {path} holds coords that are no places on a slide; make it again")
    if not len(features):
        raise FeatureError(f"feature file {path} is an empty bag: it holds no tile; leave the slide out")
    if not np.isfinite(features).all():
        raise FeatureError(f"feature file {path} holds NaN or infinite features; make it again")
    result = Features(features, np.rint(coords).astype(np.int64), attrs)
    if encoder is not None and result.encoder != encoder:
        raise FeatureError(
            f"feature file {path} was made by the encoder {result.encoder or '(unknown)'}, not by {encoder}; "
            "embed the slide again with this encoder"
        )
    return result


def read_feature_attrs(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Attributes of a feature file and its ``shape`` (N, D), without reading the features.

    Args:
        path: the HDF5 file.

    Raises:
        FeatureError: when the file is missing, damaged or of another form, its known attributes too.
    """
    path = Path(path)
    with _opened(path) as file:
        stored, placed = _datasets(file, path)
        return {**_attributes(file, stored, placed, path), "shape": _bag_shape(tuple(int(n) for n in stored.shape))}


def _datasets(file: h5py.File, path: Path) -> tuple[h5py.Dataset, h5py.Dataset | None]:
    """The features and, where the file has them, their coordinates, looked at before anything is read.

    Raises:
        FeatureError: when they are no arrays of numbers, lie in another file, or are larger than memory.
    """
    try:
        name = next((name for name in ("features", "feats") if name in file), None)
        found = [
            None if one is None else _dataset(file, one, path) for one in (name, "coords" if "coords" in file else None)
        ]
    except (KeyError, OSError, RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, FeatureError):
            raise
        raise FeatureError(f"feature file {path} is damaged ({error}); make it again") from error
    stored, placed = found
    if stored is None:
        raise FeatureError(f"feature file {path} has no dataset 'features' (or 'feats', of STAMP); make it again")
    shape = tuple(int(n) for n in stored.shape)
    if len(_bag_shape(shape)) != 2 or 0 in shape[-1:]:
        raise FeatureError(
            f"feature file {path} holds features of the shape {shape}, not (N, D) for tiles or (D,) for a slide; "
            "make it again"
        )
    return stored, placed


def _dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    if isinstance(file.get(name, getlink=True), h5py.ExternalLink):
        raise FeatureError(f"feature file {path}: {name!r} is a link to another file; copy the data into this one")
    data = file[name]
    if not isinstance(data, h5py.Dataset):
        raise FeatureError(f"feature file {path}: {name!r} is a group, not a dataset; make it again")
    if data.is_virtual or data.external:
        raise FeatureError(f"feature file {path}: {name!r} lies in another file; copy the data into this one")
    if data.dtype.kind not in "iuf":
        raise FeatureError(f"feature file {path}: {name!r} is of the type {data.dtype}, not numbers; make it again")
    size = 4 * int(np.prod([int(n) for n in data.shape], dtype=object))
    held = int(data.id.get_storage_size())
    if size > _memory() or (size > _SMALL_BYTES and size > _MOST_COMPRESSED * max(held, 1)):
        raise FeatureError(
            f"feature file {path}: {name!r} declares {size / 1e9:,.1f} GB and holds {held / 1e9:,.3f} GB; make it again"
        )
    return data


def _memory() -> int:
    """Bytes of memory of this machine."""
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else 1 << 40


def _bag_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(N, D): some tools keep a batch axis, and features of a whole slide (D,) are a bag of one."""
    if len(shape) == 1:
        return (1, *shape)
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _opened(path: Path) -> h5py.File:
    if not path.is_file():
        raise FeatureError(f"feature file {path} does not exist; embed the slide first")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise FeatureError(f"feature file {path} is damaged or no HDF5 ({error}); delete it and embed again") from error


def _attributes(file: h5py.File, stored: h5py.Dataset, placed: h5py.Dataset | None, path: Path) -> dict[str, Any]:
    attrs = plain_attributes((stored, *(() if placed is None else (placed,)), file), path)
    if stored.name == "/feats":
        # STAMP writes coordinates in micrometres: pixels of one micrometre, as it were.
        attrs.setdefault("level0_mpp", 1.0)
        if "tile_size_um" in attrs:
            attrs.setdefault("patch_size_level0", round(float(attrs["tile_size_um"])))
        if "extractor" in attrs:
            attrs.setdefault("encoder_name", attrs["extractor"])
    return attrs
