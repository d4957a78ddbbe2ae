"""Crops that are centred on a nucleus, as MONAI transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from monai.config.type_definitions import NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.meta_obj import get_track_meta
from monai.transforms import Crop, Randomizable, RandomizableTransform
from monai.transforms.lazy.functional import apply_pending
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor
from scipy import ndimage
from torch import Tensor

from cytossl_monai.transforms.kernels.checks import check_images
from cytossl_monai.transforms.kernels.colour import jitter_stain

__all__ = ["RandCropAtNucleus", "RandStainJitter"]

_FALLBACKS = ("random", "center", "error")


def _mask_plane(mask: Any, key: str) -> np.ndarray:
    """The mask as an (H, W) integer array: 0 background, else nuclei or instances."""
    if isinstance(mask, MetaTensor) and mask.has_pending_operations:
        mask, _ = apply_pending(mask)
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2:
        raise ValueError(f"{key} has the shape {array.shape}; allowed is (1, height, width) or (height, width)")
    whole = array.astype(np.int64) if array.dtype != bool else array.astype(np.int8)
    if not np.array_equal(whole, array) or whole.min(initial=0) < 0:
        raise ValueError(
            f"{key} has values that are no whole numbers >= 0; allowed are 0 and 1, or an instance map "
            "(0 background, 1, 2, ... nuclei)"
        )
    return whole


class RandCropAtNucleus(Randomizable, Crop):
    """Crop a window around a nucleus that is drawn at random, each nucleus as likely, whatever its size.

    Works lazily and can be inverted, as MONAI's own crops. Near the border the window is moved inwards, so that it
    always has its full size.

    Args:
        roi_size: side of the window in pixels, or (height, width).
        jitter: pixels by which the window may be off the nucleus' centre, each way.
        fallback: a tile without nuclei: ``"random"`` crops anywhere, ``"center"`` in the middle, ``"error"`` raises.
        lazy: leave the resampling to later, as MONAI's transforms do.

    Raises:
        ValueError: for a size below 1, a negative jitter or an unknown fallback.
    """

    def __init__(
        self, roi_size: Sequence[int] | int, jitter: int = 0, fallback: str = "random", lazy: bool = False
    ) -> None:
        super().__init__(lazy)
        size = (roi_size, roi_size) if isinstance(roi_size, int) else tuple(int(v) for v in roi_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"roi_size is {roi_size!r}; allowed is a whole number >= 1, or two: height and width")
        if jitter < 0:
            raise ValueError(f"jitter is {jitter!r}; allowed is a whole number >= 0, in pixels")
        if fallback not in _FALLBACKS:
            raise ValueError(f"fallback is {fallback!r}; allowed is one of {', '.join(_FALLBACKS)}")
        self.roi_size: tuple[int, int] = (size[0], size[1])
        self.jitter = int(jitter)
        self.fallback = fallback
        self._slices: tuple[slice, ...] | None = None

    def randomize(self, data: Any, img_size: Sequence[int] | None = None, key: str = "mask") -> None:
        """Draw where to crop.

        Args:
            data: the mask, (1, H, W) or (H, W): 0 and 1, or an instance map.
            img_size: (height, width) of the image, to hold the mask against; None takes the mask's.
            key: what a message calls the mask.

        Raises:
            ValueError: for a mask that does not fit, a window larger than the tile, or no nuclei under ``"error"``.
        """
        plane = _mask_plane(data, key)
        size = plane.shape
        if img_size is not None and tuple(int(v) for v in img_size) != size:
            raise ValueError(f"{key} has the size {size}; allowed is {tuple(img_size)}, the size of its image")
        if size[0] < self.roi_size[0] or size[1] < self.roi_size[1]:
            raise ValueError(
                f"roi_size is {self.roi_size} and the tile {size}; allowed is at most the tile: pad it first"
            )
        labels = plane if plane.max(initial=0) > 1 else ndimage.label(plane, structure=np.ones((3, 3)))[0]
        nuclei = np.unique(labels[labels > 0])
        room = [size[axis] - self.roi_size[axis] for axis in (0, 1)]
        if len(nuclei):
            rows, columns = np.nonzero(labels == nuclei[self.R.randint(len(nuclei))])
            shift = self.R.randint(-self.jitter, self.jitter + 1, size=2)
            centre = (round(float(rows.mean())) + shift[0], round(float(columns.mean())) + shift[1])
            start = [int(np.clip(centre[axis] - self.roi_size[axis] // 2, 0, room[axis])) for axis in (0, 1)]
        elif self.fallback == "error":
            raise ValueError(f"{key} holds no nucleus, and fallback is 'error'; allowed without nuclei: random, center")
        elif self.fallback == "random":
            start = [int(self.R.randint(0, space + 1)) for space in room]
        else:
            start = [space // 2 for space in room]
        self._slices = tuple(slice(first, first + side) for first, side in zip(start, self.roi_size))

    def __call__(  # type: ignore[override]
        self,
        img: Tensor,
        mask: NdarrayOrTensor | None = None,
        randomize: bool = True,
        lazy: bool | None = None,
    ) -> Tensor:
        """Crop.

        Args:
            img: (C, H, W).
            mask: (1, H, W) or (H, W), 1 on nuclei or an instance map; needed where ``randomize`` is on.
            randomize: draw a window; False takes the last one, for a second image or the mask itself.
            lazy: overrides the constructor's.

        Returns:
            (C, height, width) of ``roi_size``.

        Raises:
            ValueError: as :meth:`randomize`.
        """
        if randomize:
            if mask is None:
                raise ValueError("mask is missing; it is needed to draw a nucleus")
            shape = img.peek_pending_shape() if isinstance(img, MetaTensor) else img.shape[1:]
            self.randomize(mask, shape)
        if self._slices is None:
            raise RuntimeError("call with randomize=True, or randomize(mask), first")
        return super().__call__(img=img, slices=self._slices, lazy=self.lazy if lazy is None else lazy)


class RandStainJitter(RandomizableTransform):
    """Scale and shift the haematoxylin, eosin and DAB channels of a tile, nuclei included.

    The same kernel as in ``ViewGenerator``: the same seed makes the same pixels.

    Args:
        prob: probability that a tile is changed, in [0, 1].
        scale: a stain's density is multiplied by 1 - scale to 1 + scale.
        shift: and shifted by -shift to shift, in absorbance.

    Raises:
        ValueError: for a number outside its range.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.TORCH]

    def __init__(self, prob: float = 0.8, scale: float = 0.3, shift: float = 0.02) -> None:
        if not 0.0 <= prob <= 1.0:
            raise ValueError(f"prob is {prob!r}; allowed is a number in [0, 1]")
        if not 0.0 <= scale <= 1.0 or not 0.0 <= shift <= 1.0:
            raise ValueError(f"scale is {scale!r} and shift {shift!r}; allowed are numbers in [0, 1]")
        RandomizableTransform.__init__(self, prob)
        self.scale, self.shift = float(scale), float(shift)
        self.seed = 0

    def randomize(self, data: Any = None) -> None:
        """Draw whether and with which seed the next tile is changed."""
        super().randomize(None)
        self.seed = int(self.R.randint(0, 1 << 62, dtype=np.int64))

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True, key: str = "img") -> Tensor:
        """Vary the stains of a tile.

        Args:
            img: (3 or 1, H, W), uint8 or floating point in [0, 1]; not written to.
            randomize: draw anew; False repeats what was drawn last.
            key: what a message calls the tile.

        Returns:
            A tensor of the same shape and dtype, with the metadata of a MetaTensor.

        Raises:
            ValueError: for a tile that does not fit.
        """
        tensor = convert_to_tensor(img, track_meta=get_track_meta())
        image = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
        check_images(image, key, dims=3)
        if randomize:
            self.randomize()
        if not self._do_transform:
            return tensor
        unit = image.float().div(255.0) if image.dtype == torch.uint8 else image.float()
        seeds = torch.tensor([self.seed], dtype=torch.int64)
        out = jitter_stain(unit.unsqueeze(0), torch.ones(1), seeds, self.scale, self.shift)[0]
        out = out.mul_(255.0).round_().to(torch.uint8) if image.dtype == torch.uint8 else out.to(image.dtype)
        return convert_to_dst_type(out, tensor)[0]
