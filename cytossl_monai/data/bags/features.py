"""The feature store: one HDF5 file a slide, in the form that CLAM and TRIDENT read and write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from cytossl_monai.utils.errors import FeatureError
from cytossl_monai.utils.files import atomic_path

__all__ = ["Features", "read_feature_attrs", "read_features", "write_features"]

FORMAT = "cytossl-features"
VERSION = 1


@dataclass(frozen=True)
class Features:
    """What a feature file holds.

    Args:
        features: (N, D) float32, one row a tile.
        coords: (N, 2) int64, x and y of the tile's top-left corner in level-0 pixels.
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
            file.attrs[key] = value
            file["coords"].attrs[key] = value
    return path


def read_features(path: str | os.PathLike[str], encoder: str | None = None) -> Features:
    """Read one slide's features; files of CLAM and TRIDENT are read as well.

    Args:
        path: the HDF5 file.
        encoder: hash that the features must have been made by; None takes any.

    Returns:
        the features as float32, their places and the attributes (of ``features``, ``coords`` and the file, the
        latter counting where names meet).

    Raises:
        FeatureError: when the file is missing, damaged, of another form, without a tile, not finite, or made by another
            encoder.
    """
    path = Path(path)
    with _opened(path) as file:
        try:
            features = np.asarray(file["features"][()], dtype=np.float32)
            coords = np.asarray(file["coords"][()])
        except (KeyError, OSError, ValueError, TypeError) as error:
            raise FeatureError(
                f"feature file {path} has no readable 'features' and 'coords' ({error}); make it again"
            ) from error
        attrs = _attributes(file)
    if features.ndim == 3 and features.shape[0] == 1:
        features = features[0]  # some slide tools keep a batch axis
    if features.ndim != 2 or coords.shape != (len(features), 2):
        raise FeatureError(
            f"feature file {path} holds features {features.shape} and coords {coords.shape}, not (N, D) and (N, 2); "
            "make it again"
        )
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
        FeatureError: when the file is missing, damaged or of another form.
    """
    path = Path(path)
    with _opened(path) as file:
        if "features" not in file or "coords" not in file:
            raise FeatureError(f"feature file {path} has no 'features' and 'coords'; make it again")
        return {**_attributes(file), "shape": tuple(int(n) for n in file["features"].shape[-2:])}


def _opened(path: Path) -> h5py.File:
    if not path.is_file():
        raise FeatureError(f"feature file {path} does not exist; embed the slide first")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise FeatureError(f"feature file {path} is damaged or no HDF5 ({error}); delete it and embed again") from error


def _attributes(file: h5py.File) -> dict[str, Any]:
    attrs: dict[str, Any] = {}
    for holder in (file["features"], file["coords"], file):
        for key, value in holder.attrs.items():
            if isinstance(value, bytes):
                value = value.decode("utf-8", "replace")
            elif isinstance(value, np.generic):
                value = value.item()
            attrs[key] = value
    return attrs
