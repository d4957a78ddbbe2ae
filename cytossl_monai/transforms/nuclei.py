"""Find nuclei in a tile without weights: ``segment_instances``, and the MONAI transforms over it and its fast twin."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_dst_type, convert_to_tensor, ensure_tuple_rep
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from cytossl_monai.transforms.nuclei_backend import ArrayBackend, BackendName, array_backend
from cytossl_monai.transforms.nuclei_mask import nuclear_density, nuclei_mask
from cytossl_monai.transforms.nuclei_regions import RegionRules, noise_level, select_regions
from cytossl_monai.transforms.nuclei_split import split_touching
from cytossl_monai.transforms.nuclei_table import NucleiInstances, describe_nuclei
from cytossl_monai.transforms.stains import rgb_to_od, separate_stains, stain_matrix

__all__ = [
    "NucleiInstances",
    "RegionRules",
    "SegmentNuclei",
    "SegmentNucleiD",
    "SegmentNucleiDict",
    "SegmentNucleid",
    "segment_instances",
]

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
    best edges and shapes are picked (see ``nuclei_regions``), each with the threshold that suits it; those with a neck
    are parted there (see ``nuclei_split``).

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
    labels = _labels_at(libraries.xp.asarray(regions), (height, width), libraries)
    described = labels if table else np.zeros((1, 1), np.int32)
    return NucleiInstances(labels, describe_nuclei(described, mpp, pixels.cpu()), mpp)


class SegmentNuclei(Transform):
    """Nuclei of a tile: binary mask, and on request an instance map and a table.

    Args:
        mpp: micrometres per pixel; None reads ``mpp`` from a MetaTensor's ``meta``.
        method: ``"instances"`` picks each nucleus exactly (``segment_instances``), ``"mask"`` runs the fast batched
            kernel (``nuclei_mask``) and forms instances, where asked for, from its connected components.
        output: ``"mask"`` returns the mask; ``"labels"`` the instance map; ``"all"`` a ``NucleiInstances``.
        stains: named stain or matrix for colour deconvolution, for ``method="instances"``; None suits every stain.
        rules: what counts as a nucleus; None for the defaults.

    Raises:
        ValueError: unknown method or output, ``mpp`` not positive.
    """

    def __init__(
        self,
        mpp: float | None = None,
        method: Literal["instances", "mask"] = "instances",
        output: Literal["mask", "labels", "all"] = "mask",
        stains: str | NDArray[Any] | None = None,
        rules: RegionRules | None = None,
    ) -> None:
        if method not in ("instances", "mask"):
            raise ValueError(f"method is {method!r}; it must be 'instances' or 'mask'.")
        if output not in ("mask", "labels", "all"):
            raise ValueError(f"output is {output!r}; it must be 'mask', 'labels' or 'all'.")
        if stains is not None:
            stain_matrix(stains)
        self.mpp = None if mpp is None else check_mpp(mpp)
        self.method, self.output, self.stains, self.rules = method, output, stains, rules

    def find(self, image: NdarrayOrTensor, mpp: float | None = None, table: bool = True) -> NucleiInstances:
        """Nuclei of one image with all that is known about them.

        Args:
            image: (3, H, W), (1, H, W) or (H, W).
            mpp: overrides the transform's own.
            table: also describe each nucleus.
        """
        if mpp is None:
            mpp = self.mpp
        if mpp is None and isinstance(image, MetaTensor):
            mpp = image.meta.get("mpp")
        scale = check_mpp(mpp)
        if self.method == "instances":
            return segment_instances(image, scale, stains=self.stains, rules=self.rules, table=table)
        pixels = check_image(image)
        mask = nuclei_mask(pixels[None], scale, rules=self.rules)[0, 0].cpu().numpy()
        labels = np.asarray(ndimage.label(mask, ndimage.generate_binary_structure(2, 2))[0], dtype=np.int32)
        return NucleiInstances(labels, describe_nuclei(labels if table else labels[:0, :0], scale, pixels.cpu()), scale)

    def __call__(self, img: NdarrayOrTensor, mpp: float | None = None) -> NdarrayOrTensor | NucleiInstances:
        """Segment one image.

        Args:
            img: (3, H, W) or (1, H, W), uint8 in [0, 255] or floating point in [0, 1].
            mpp: micrometres per pixel of this image, in place of the transform's own.

        Returns:
            mask uint8 (1, H, W) of values 0 and 1, or labels int32 (1, H, W), of the kind of ``img`` (a MetaTensor
            keeps its affine); with ``output="all"`` a ``NucleiInstances``.
        """
        found = self.find(img, mpp, table=self.output == "all")
        if self.output == "all":
            return found
        return as_output(found.labels if self.output == "labels" else found.mask.astype(np.uint8), img)


def as_output(array: NDArray[Any], like: NdarrayOrTensor) -> NdarrayOrTensor:
    """(H, W) array as (1, H, W), of the kind (array, tensor, MetaTensor with its affine) and device of ``like``."""
    dtype = convert_to_tensor(array[:0]).dtype if isinstance(like, torch.Tensor) else array.dtype
    return convert_to_dst_type(array[None], dst=like, dtype=dtype)[0]


class SegmentNucleid(MapTransform):
    """Dictionary twin of ``SegmentNuclei``.

    Args:
        keys: images to segment.
        mask_keys: where each mask goes; one name, or one for each key.
        labels_keys: where each instance map goes, int32 (1, H, W); None leaves it out.
        table_keys: where each table goes, a pandas DataFrame; None leaves it out. (MONAI's default collate cannot batch
            it: take it out before a DataLoader.)
        mpp: micrometres per pixel; None takes ``data[mpp_key]``, then the MetaTensor's own ``meta["mpp"]``.
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
            mpp = self.segment.mpp if self.segment.mpp is not None else result.get(self.mpp_key)
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
