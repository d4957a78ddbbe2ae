"""Nuclei of one image as instances, without weights: the exact path."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.utils import convert_to_dst_type, convert_to_tensor
from numpy.typing import ArrayLike, NDArray

from cytossl_monai.transforms.kernels.stained import optical_density, stained_regions
from cytossl_monai.transforms.kernels.stains import rgb_to_od, separate_stains, stain_matrix
from cytossl_monai.transforms.nuclei.backend import ArrayBackend, BackendName, array_backend
from cytossl_monai.transforms.nuclei.mask import nuclear_density
from cytossl_monai.transforms.nuclei.regions import RegionRules, noise_level, select_regions
from cytossl_monai.transforms.nuclei.split import split_touching
from cytossl_monai.transforms.nuclei.table import NucleiInstances, describe_nuclei

__all__ = ["SMOOTHING", "WORKING_MPP", "as_output", "check_image", "check_mpp", "segment_instances"]

WORKING_MPP = 0.5
"""Micrometres per pixel at which regions are picked: finer tiles are shrunk to it, coarser ones left as they are."""


SMOOTHING = 0.2
"""Standard deviation in micrometres of the Gaussian that takes camera noise away. More would round off small nuclei."""


def check_image(image: Any, name: str = "image") -> torch.Tensor:
    """The image as a plain tensor (C, H, W), on the device where it lies.

    Args:
        image: (3, H, W), (1, H, W) or (H, W), array or tensor; uint8 in [0, 255] or floating point in [0, 1].
        name: what to call it in messages.

    Returns:
        uint8 or float32.

    Raises:
        ValueError: other shapes or types, an empty or all-NaN image, values outside the range.
    """
    tensor = (
        image.as_tensor()
        if isinstance(image, MetaTensor)
        else torch.as_tensor(np.asarray(image))
        if not (isinstance(image, torch.Tensor))
        else image
    )
    tensor = tensor.detach()
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ValueError(f"{name} must have shape (3, H, W), (1, H, W) or (H, W), not {tuple(tensor.shape)}.")
    if 0 in tensor.shape:
        raise ValueError(f"{name} has no pixels: its shape is {tuple(tensor.shape)}.")
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be uint8 or floating point, not {tensor.dtype}.")
    tensor = tensor.float()
    if bool(tensor.isnan().all()):
        raise ValueError(f"{name} holds nothing but NaN.")
    low, high = float(tensor.nan_to_num(0.5).min()), float(tensor.nan_to_num(0.5).max())
    if low < -1e-3 or high > 1.0 + 1e-3:
        raise ValueError(f"{name} is floating point in [{low:.3g}, {high:.3g}]; give uint8, or floats in [0, 1].")
    return tensor


def check_mpp(mpp: Any, name: str = "mpp") -> float:
    """``mpp`` as a positive number.

    Raises:
        ValueError: it is missing, not one number, not finite or not positive.
    """
    if mpp is None:
        raise ValueError(f"{name} is missing: sizes of nuclei are rules in micrometres. Give micrometres per pixel.")
    values = np.asarray(mpp.cpu() if isinstance(mpp, torch.Tensor) else mpp, dtype=np.float64).reshape(-1)
    if values.size not in (1, 2) or not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(f"{name} is {mpp}; it must be a positive number of micrometres per pixel.")
    if values.size == 2 and abs(values[0] / values[1] - 1) > 0.02:
        raise ValueError(f"{name} is {mpp}; pixels must be square within 2 %.")
    return float(values.mean())


def _stain_density(image: torch.Tensor, stains: str | NDArray[Any] | None) -> torch.Tensor:
    """Nuclear density (H, W), float32: the bound of ``nuclear_density``, or the first stain of a named matrix."""
    if stains is None or image.shape[0] == 1:
        return nuclear_density(image)[0]
    matrix = stain_matrix(stains)
    od = rgb_to_od(image.nan_to_num(1.0) if image.is_floating_point() else image)
    # In units of the density in red and green, so that the same rules hold as without deconvolution.
    return separate_stains(od, matrix)[0].clamp_min(0.0) * float(matrix[0, :2].mean())


def _resample(density: Any, shape: tuple[int, int], factor: float, backend: ArrayBackend) -> Any:
    """Density at the working resolution, smoothed against aliasing where it shrinks."""
    if factor > 1.3:
        density = backend.ndimage.gaussian_filter(density, 0.5 * (factor**2 - 1) ** 0.5, mode="nearest")
    if density.shape == shape:
        return density
    zoom = (shape[0] / density.shape[0], shape[1] / density.shape[1])
    resized = backend.ndimage.zoom(density, zoom, order=1, mode="nearest", grid_mode=True)
    return resized.astype(backend.xp.float32)


def _labels_at(labels: Any, shape: tuple[int, int], backend: ArrayBackend) -> NDArray[np.int32]:
    """Labels at another resolution, with smooth outlines; numbered 1..n without gaps; on the host."""
    xp = backend.xp
    if labels.shape != shape:
        zoom = (shape[0] / labels.shape[0], shape[1] / labels.shape[1])
        filled = (labels > 0).astype(xp.float32)
        inside = backend.ndimage.zoom(filled, zoom, order=1, mode="nearest", grid_mode=True) > 0.5
        rows, columns = (
            xp.minimum(((xp.arange(n) + 0.5) * m / n).astype(xp.int64), m - 1) for n, m in zip(shape, labels.shape)
        )
        labels = backend.expand_labels(labels, 2)[rows][:, columns] * inside
    values, inverse = np.unique(backend.to_numpy(labels), return_inverse=True)
    start = 0 if values.size and values[0] == 0 else 1
    return (inverse.reshape(shape) + start).astype(np.int32)


def _stained(regions: NDArray[np.int32], pixels: torch.Tensor, mpp: float, rules: RegionRules) -> NDArray[np.int32]:
    """The regions that are stained as nuclei are; the others become 0."""
    if pixels.shape[0] != 3:
        return regions
    labels = torch.from_numpy(regions)[None]
    shape = (regions.shape[0], regions.shape[1])
    density, count = optical_density(pixels.cpu()[None], shape), int(regions.max(initial=0))
    keep = stained_regions(labels, count, density, mpp, rules.min_stain, rules.min_colour)
    return np.where(keep.numpy()[regions], regions, 0).astype(np.int32)


def segment_instances(
    image: ArrayLike | torch.Tensor,
    mpp: float,
    *,
    stains: str | NDArray[Any] | None = None,
    rules: RegionRules | None = None,
    table: bool = True,
    backend: BackendName = "auto",
) -> NucleiInstances:
    """Find every nucleus of a tile, exactly: the reference that ``nuclei_mask`` approximates.

    The nuclear density of each pixel is brought to 0.5 um/px and smoothed; from its component tree the regions with the
    best edges and shapes are picked (see ``nuclei.regions``), each with the threshold that suits it; those with a neck
    are parted there (see ``nuclei.split``).

    Args:
        image: (3, H, W), (1, H, W) or (H, W); uint8 in [0, 255] or floating point in [0, 1].
        mpp: micrometres per pixel.
        stains: None takes the density that red and green share, which suits every stain tried. A name of
            ``stains.STAINS`` or a (2 or 3, 3) matrix takes its first stain by colour deconvolution instead.
        rules: sizes, shapes and contrasts; None for the defaults.
        table: also describe each nucleus; without it ``NucleiInstances.table`` has its columns and no row.
        backend: ``"cpu"``, ``"cucim"`` (CuPy and ``cucim.skimage``, on a GPU), or ``"auto"``: what suits the tile's
            device.

    Returns:
        labels, table and mask, see ``NucleiInstances``. Nothing found gives zeros and an empty table.

    Raises:
        ValueError: image or ``mpp`` unusable, unknown stains.
    """
    pixels, mpp = check_image(image), check_mpp(mpp)
    libraries = array_backend(backend, pixels.device)
    rules = rules or RegionRules()
    height, width = pixels.shape[-2:]
    # Enlarging a coarse tile adds nothing, and what interpolation makes of noise looks like small nuclei.
    scale = max(WORKING_MPP, mpp)
    shape = (max(1, round(height * mpp / scale)), max(1, round(width * mpp / scale)))
    density = libraries.from_torch(_stain_density(pixels, stains))
    if noise_level(density, libraries) > rules.max_noise:
        density = libraries.xp.zeros_like(density)
    density = _resample(density, shape, scale / mpp, libraries)
    density = libraries.gaussian(density, SMOOTHING / scale, mode="nearest", preserve_range=True)
    regions, _ = select_regions(density, scale, rules, libraries)
    regions = split_touching(libraries.to_numpy(regions), scale)
    regions = _stained(regions, pixels, scale, rules)
    labels = _labels_at(libraries.xp.asarray(regions), (height, width), libraries)
    described = labels if table else np.zeros((1, 1), np.int32)
    return NucleiInstances(labels, describe_nuclei(described, mpp, pixels.cpu()), mpp)


def as_output(array: NDArray[Any], like: NdarrayOrTensor) -> NdarrayOrTensor:
    """(H, W) array as (1, H, W), of the kind (array, tensor, MetaTensor with its affine) and device of ``like``."""
    dtype = convert_to_tensor(array[:0]).dtype if isinstance(like, torch.Tensor) else array.dtype
    return convert_to_dst_type(array[None], dst=like, dtype=dtype)[0]
