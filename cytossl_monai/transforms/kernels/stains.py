"""Optical density, named stain vectors and colour deconvolution, for NumPy arrays and PyTorch tensors alike.

Light that passes a stain is weakened exponentially (Beer-Lambert), so stains add up in optical density (OD) and not in
RGB. Everything here is channel first, ``(..., 3, H, W)``, and keeps the kind of what it is given: an array gives an
array, a tensor gives a tensor on the same device, through which gradients flow.

References:
    Ruifrok and Johnston, Quantification of histochemical staining by color deconvolution, Anal Quant Cytol Histol 2001.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from skimage import color

__all__ = ["OD_MAX", "STAINS", "combine_stains", "od_to_rgb", "rgb_to_od", "separate_stains", "stain_matrix"]

ArrayOrTensor = TypeVar("ArrayOrTensor", NDArray[Any], torch.Tensor)

_FLOOR = 1.0 / 255.0
OD_MAX = float(-np.log10(_FLOOR))
"""Largest optical density of an 8-bit image (about 2.41): what black gives."""


def _complete(*vectors: tuple[float, float, float]) -> NDArray[np.float64]:
    """Unit stain vectors as rows; two are completed by their cross product, so that the matrix can be inverted."""
    rows = [np.asarray(v, dtype=np.float64) / np.linalg.norm(v) for v in vectors]
    if len(rows) == 2:
        residual = np.cross(rows[0], rows[1])
        rows.append(residual / np.linalg.norm(residual))
    matrix = np.stack(rows)
    matrix.flags.writeable = False
    return matrix


_HEMATOXYLIN, _EOSIN, _DAB = (tuple(row) for row in color.rgb_from_hed)
_AZURE, _GIEMSA_EOSIN = (tuple(row) for row in color.rgb_from_gdx[:2])

STAINS: Mapping[str, NDArray[np.float64]] = MappingProxyType(
    {
        "hed": _complete(_HEMATOXYLIN, _EOSIN, _DAB),
        "he": _complete(_HEMATOXYLIN, _EOSIN),
        # Blue-green (light green of EA) and pink-orange (eosin Y, orange G) cytoplasm beside haematoxylin; the last two
        # are typical colours of such cytoplasm, (150, 200, 200) and (220, 150, 160) on white glass, in optical density.
        "papanicolaou": _complete(_HEMATOXYLIN, (0.84, 0.385, 0.385), (0.20, 0.75, 0.63)),
        "giemsa": _complete(_AZURE, _GIEMSA_EOSIN),
    }
)
"""Named stain matrices: one unit stain vector a row, columns are the optical densities of red, green and blue.

``hed`` haematoxylin, eosin, DAB; ``he`` haematoxylin, eosin, residual; ``papanicolaou`` haematoxylin, light green,
eosin and orange G; ``giemsa`` azure and methylene blue, eosin, residual. Row 0 is the nuclear stain in each.
"""


def stain_matrix(stains: str | NDArray[Any]) -> NDArray[np.float64]:
    """The matrix that a name stands for, or a matrix of one's own, checked and scaled to unit rows.

    Args:
        stains: a key of ``STAINS``, or (2 or 3, 3) stain vectors in optical density, one a row.

    Returns:
        float64 (3, 3), unit rows.

    Raises:
        ValueError: unknown name, wrong shape, or vectors that depend on each other linearly.
    """
    if isinstance(stains, str):
        if stains not in STAINS:
            raise ValueError(f"stains is {stains!r}; known names are {', '.join(STAINS)}, or give a (3, 3) matrix.")
        return STAINS[stains]
    given = np.asarray(stains, dtype=np.float64)
    if given.shape not in ((2, 3), (3, 3)) or not np.isfinite(given).all():
        raise ValueError(f"stains must be finite numbers of shape (2, 3) or (3, 3), not shape {given.shape}.")
    if np.any(np.linalg.norm(given, axis=1) < 1e-6):
        raise ValueError("stains holds a zero row; give each stain its optical densities of red, green and blue.")
    matrix = _complete(*(tuple(row) for row in given))
    if np.linalg.cond(matrix) > 1e4:
        raise ValueError("stains holds vectors that depend on each other linearly, so that they cannot be separated.")
    return matrix


def rgb_to_od(image: ArrayOrTensor, white: Any = 1.0) -> ArrayOrTensor:
    """Optical density ``log10(white / image)`` of each channel.

    Args:
        image: (..., C, H, W), uint8 in [0, 255] or floating point in [0, 1].
        white: colour of clear glass in [0, 1]: one number, or anything that broadcasts against ``image``,
            as ``glass.view(B, 3, 1, 1)``.

    Returns:
        same shape and kind; float32, or the input's own floating type. Values lie in [0, ``OD_MAX``] for white 1;
        pixels brighter than ``white`` come out slightly negative.
    """
    if isinstance(image, torch.Tensor):
        scaled = image if image.is_floating_point() else image.float() / 255.0
        level = white if isinstance(white, torch.Tensor) else torch.as_tensor(white, dtype=scaled.dtype)
        level = level.to(device=scaled.device, dtype=scaled.dtype).clamp_min(_FLOOR)
        return level.log10() - scaled.clamp_min(_FLOOR).log10()
    array = np.asarray(image)
    values = array if array.dtype.kind == "f" else array.astype(np.float32) / np.float32(255.0)
    bright = np.maximum(np.asarray(white, dtype=values.dtype), values.dtype.type(_FLOOR))
    return cast(ArrayOrTensor, np.log10(bright) - np.log10(np.maximum(values, values.dtype.type(_FLOOR))))


def od_to_rgb(od: ArrayOrTensor, white: Any = 1.0) -> ArrayOrTensor:
    """Inverse of ``rgb_to_od``: floating point RGB, clipped to [0, 1].

    Args:
        od: (..., C, H, W) optical densities.
        white: the colour of clear glass that ``rgb_to_od`` was given.

    Returns:
        same shape, kind and floating type, in [0, 1].
    """
    if isinstance(od, torch.Tensor):
        level = white if isinstance(white, torch.Tensor) else torch.as_tensor(white, dtype=od.dtype)
        level = level.to(device=od.device, dtype=od.dtype).clamp_min(_FLOOR)
        return (level * torch.pow(10.0, -od)).clamp(0.0, 1.0)
    array = np.asarray(od)
    bright = np.maximum(np.asarray(white, dtype=array.dtype), array.dtype.type(_FLOOR))
    return cast(ArrayOrTensor, np.clip(bright * np.power(array.dtype.type(10.0), -array), 0.0, 1.0))


def _mix(channels: ArrayOrTensor, matrix: NDArray[Any]) -> ArrayOrTensor:
    """Multiply the channel axis, third from the end, by ``matrix`` (rows in, columns out)."""
    if channels.ndim < 3 or channels.shape[-3] != 3:
        raise ValueError(f"Expected three channels before height and width, got shape {tuple(channels.shape)}.")
    if isinstance(channels, torch.Tensor):
        weight = torch.as_tensor(np.array(matrix), dtype=channels.dtype, device=channels.device)
        return torch.einsum("...chw,cs->...shw", channels, weight)
    return cast(ArrayOrTensor, np.einsum("...chw,cs->...shw", channels, matrix.astype(channels.dtype)))


def separate_stains(od: ArrayOrTensor, stains: str | NDArray[Any] = "hed") -> ArrayOrTensor:
    """Colour deconvolution: how much of each stain a pixel holds.

    Args:
        od: (..., 3, H, W) optical densities.
        stains: name or matrix, see ``stain_matrix``.

    Returns:
        same shape and kind: concentrations, channel i for row i of the matrix. They may be slightly negative.
    """
    return _mix(od, np.linalg.inv(stain_matrix(stains)))


def combine_stains(concentrations: ArrayOrTensor, stains: str | NDArray[Any] = "hed") -> ArrayOrTensor:
    """Inverse of ``separate_stains``: concentrations (..., 3, H, W) to optical densities."""
    return _mix(concentrations, stain_matrix(stains))
