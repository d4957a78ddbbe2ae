"""Crops at nuclei and stain jitter as dictionary transforms; see `array`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from monai.config import KeysCollection
from monai.config.type_definitions import NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandCropd, RandomizableTransform
from monai.utils import TransformBackends

from cytossl_monai.transforms.views.array import RandCropAtNucleus, RandStainJitter

__all__ = [
    "RandCropAtNucleusD",
    "RandCropAtNucleusDict",
    "RandCropAtNucleusd",
    "RandStainJitterD",
    "RandStainJitterDict",
    "RandStainJitterd",
]


class RandCropAtNucleusd(RandCropd):
    """Dictionary twin of :class:`RandCropAtNucleus`: all keys are cropped to the same window.

    Args:
        keys: what to crop; name the mask here too if it is to stay in step.
        roi_size: side of the window in pixels, or (height, width).
        mask_key: where the nuclei are.
        jitter: pixels by which the window may be off the nucleus' centre, each way.
        fallback: a tile without nuclei: ``"random"`` crops anywhere, ``"center"`` in the middle, ``"error"`` raises.
        allow_missing_keys: pass over keys that are not there.
        lazy: leave the resampling to later, as MONAI's transforms do.
    """

    def __init__(
        self,
        keys: KeysCollection,
        roi_size: Sequence[int] | int,
        mask_key: str = "nuclei",
        jitter: int = 0,
        fallback: str = "random",
        allow_missing_keys: bool = False,
        lazy: bool = False,
    ) -> None:
        cropper = RandCropAtNucleus(roi_size, jitter, fallback, lazy=lazy)
        super().__init__(keys, cropper=cropper, allow_missing_keys=allow_missing_keys, lazy=lazy)
        self.mask_key = mask_key

    @property
    def requires_current_data(self) -> bool:
        """Where the nuclei lie is known only once pending operations are carried out."""
        return True

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        """Crop every key; ValueErrors name the key that does not fit."""
        d = dict(data)
        if self.mask_key not in d:
            raise ValueError(f"{self.mask_key} is missing; this dictionary has {sorted(map(str, d))}")
        cropper: RandCropAtNucleus = self.cropper
        first = d[self.first_key(d)]
        shape = first.peek_pending_shape() if isinstance(first, MetaTensor) else first.shape[1:]
        cropper.randomize(d[self.mask_key], shape, self.mask_key)
        lazy_ = self.lazy if lazy is None else lazy
        for key in self.key_iterator(d):
            d[key] = cropper(d[key], randomize=False, lazy=lazy_)
        return d


RandCropAtNucleusD = RandCropAtNucleusDict = RandCropAtNucleusd


class RandStainJitterd(RandomizableTransform, MapTransform):
    """Dictionary twin of :class:`RandStainJitter`; all keys are changed alike.

    Args:
        keys: the tiles to change.
        prob: probability that they are changed, in [0, 1].
        scale: a stain's density is multiplied by 1 - scale to 1 + scale.
        shift: and shifted by -shift to shift, in absorbance.
        allow_missing_keys: pass over keys that are not there.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.TORCH]

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.8,
        scale: float = 0.3,
        shift: float = 0.02,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.jitter = RandStainJitter(prob, scale, shift)
        RandomizableTransform.__init__(self, prob)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandStainJitterd:
        """Set the state that seeds are drawn from."""
        super().set_random_state(seed, state)
        self.jitter.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """Vary the stains of every key; ValueErrors name the key that does not fit."""
        d = dict(data)
        self.jitter.randomize()
        for key in self.key_iterator(d):
            d[key] = self.jitter(d[key], randomize=False, key=str(key))
        return d


RandStainJitterD = RandStainJitterDict = RandStainJitterd
