"""The attributes of a feature file as plain values of the kinds that this package reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cytossl_monai.utils.errors import FeatureError, reason
from cytossl_monai.utils.files import encodable

__all__ = ["plain_attributes"]

_TEXTS = frozenset({"encoder", "encoder_name", "extractor", "slide_id", "slide_path", "instances"})
_NUMBERS = {
    "scales": 1.0,
    "patch_size": 1.0,
    "patch_size_level0": 1.0,
    "level0_width": 1.0,
    "level0_height": 1.0,
    "tile_size_um": 1.0,
    "overlap": 0.0,
    "mpp": 1e-6,
    "level0_mpp": 1e-6,
}
"""Numbers that something is worked out from, with the least that each may be; others are handed on as they are."""

_MOST = float(1 << 40)
_SHOWN = 60


def plain_attributes(holders: Iterable[h5py.HLObject], path: Path) -> dict[str, Any]:
    """Attributes of an HDF5 file's parts: text that can be written anywhere, and numbers that can be computed with.

    Args:
        holders: the file, its groups and data sets; where names meet, the last counts.
        path: the file, for the message.

    Returns:
        names and values. An attribute that is there and holds nothing (``h5py.Empty``) is left out.

    Raises:
        FeatureError: when an attribute cannot be read, or a known one is of another kind or out of range.
    """
    attrs: dict[str, Any] = {}
    for holder in holders:
        try:
            found = dict(holder.attrs.items())
        except (KeyError, OSError, ValueError, TypeError, RuntimeError) as error:
            raise FeatureError(f"feature file {path}: its attributes cannot be read ({reason(error)})") from error
        for key, value in found.items():
            if not isinstance(value, h5py.Empty):
                attrs[encodable(key)] = _checked(encodable(key), _plain(value), path)
    return attrs


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value[()]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        # HDF5 calls text UTF-8 without looking: h5py hands on its other bytes as halves of characters.
        return encodable(str(value))
    return value.item() if isinstance(value, np.generic) else value


def _checked(key: str, value: Any, path: Path) -> Any:
    if key not in _TEXTS and key not in _NUMBERS:
        return value
    if isinstance(value, np.ndarray) and value.size == 1:
        value = _plain(value.reshape(()))
    told = " ".join(str(value).split())[:_SHOWN]
    advice = "correct the attribute or make the file again"
    if key in _TEXTS:
        if not isinstance(value, (str, int, float)):
            raise FeatureError(f"feature file {path}: attribute {key} is {told}, not one text; {advice}")
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not _NUMBERS[key] <= number <= _MOST:
        raise FeatureError(
            f"feature file {path}: attribute {key} is {told}, no number from {_NUMBERS[key]:g} to {_MOST:g}; {advice}"
        )
    return number if isinstance(value, str) else value
