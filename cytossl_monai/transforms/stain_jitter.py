"""Stain strengths varied in optical density, as MONAI transforms."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from monai.config import KeysCollection
from monai.config.type_definitions import NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.meta_obj import get_track_meta
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor
from torch import Tensor

from cytossl_monai.transforms.functional import jitter_stain
from cytossl_monai.transforms.ncp_checks import check_images

__all__ = ["RandStainJitter", "RandStainJitterD", "RandStainJitterDict", "RandStainJitterd"]


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
