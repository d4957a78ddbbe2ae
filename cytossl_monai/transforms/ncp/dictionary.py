"""Nuclei-Centered Perturbation as dictionary transforms; see `array`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import numpy as np
from monai.config import KeysCollection
from monai.config.type_definitions import NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform
from monai.transforms.lazy.functional import apply_pending
from monai.utils import TransformBackends

from cytossl_monai.transforms.kernels.checks import stated_mpp
from cytossl_monai.transforms.ncp.array import NucleiCenteredPerturb, RandNucleiCenteredPerturb, perturb_one

__all__ = [
    "NucleiCenteredPerturbD",
    "NucleiCenteredPerturbDict",
    "NucleiCenteredPerturbd",
    "RandNucleiCenteredPerturbD",
    "RandNucleiCenteredPerturbDict",
    "RandNucleiCenteredPerturbd",
]


class _PerturbDict(MapTransform):
    """What the two dictionary twins share: where mask, mpp and donor come from."""

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.TORCH]
    perturb: NucleiCenteredPerturb | RandNucleiCenteredPerturb

    def __init__(
        self,
        keys: KeysCollection,
        mask_key: str,
        mpp_key: str,
        donor_key: str | None,
        donor_mask_key: str | None,
        allow_missing_keys: bool,
        points_key: str | None,
        valid_key: str | None,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.valid_key = valid_key
        self.mask_key, self.mpp_key = mask_key, mpp_key
        self.donor_key, self.donor_mask_key, self.points_key = donor_key, donor_mask_key, points_key

    def _needed(self, data: dict[Hashable, Any], key: str) -> Any:
        """``data[key]``, its pending operations carried out: Compose does that for the keys it knows alone."""
        if key not in data:
            raise ValueError(
                f"{key} is missing; allowed is a dictionary that holds it, this one has {sorted(map(str, data))}"
            )
        if isinstance(data[key], MetaTensor) and data[key].has_pending_operations:
            data[key], _ = apply_pending(data[key])
        return data[key]

    def _perturb_all(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        d = dict(data)
        points = None if self.points_key is None else self._needed(d, self.points_key)
        mask = self._needed(d, self.mask_key) if points is None or self.mask_key in d else None
        donor = None if self.donor_key is None else self._needed(d, self.donor_key)
        donor_mask = None if self.donor_mask_key is None else self._needed(d, self.donor_mask_key)
        valid = None if self.valid_key is None else self._needed(d, self.valid_key)
        names = (self.mask_key, str(self.donor_key), str(self.donor_mask_key))
        for key in self.key_iterator(d):
            image = self._needed(d, str(key))
            settings, seed = self.perturb.settings, self.perturb.seed
            mpp = stated_mpp(self.perturb.mpp, image, d.get(self.mpp_key))
            named = (str(key), *names)
            d[key] = perturb_one(image, mask, mpp, seed, settings, donor, donor_mask, named, points, valid)
        return d


class NucleiCenteredPerturbd(_PerturbDict):
    """Dictionary twin of :class:`NucleiCenteredPerturb`, where the arguments that are not listed are explained.

    Args:
        keys: the tiles to perturb.
        mask_key: where the nuclei are.
        mpp: micrometres per pixel; None takes the MetaTensor's own ``meta["mpp"]``, then ``data[mpp_key]``.
        mpp_key: key of the sample's micrometres per pixel.
        donor_key: where the tile is whose background ``swap`` takes; None leaves ``swap`` out.
        donor_mask_key: where its nuclei are; None takes the donor as it is.
        allow_missing_keys: pass over keys that are not there.
        points_key: where the nuclei's x and y are, of a detector; None: they are the parts of the mask.
        valid_key: where left, top, right and bottom of the real pixels are, as `ImageFolder` says them; None: all are.
    """

    def __init__(
        self,
        keys: KeysCollection,
        ops: Mapping[str, float],
        mask_key: str = "nuclei",
        mpp: float | None = None,
        mpp_key: str = "mpp",
        donor_key: str | None = None,
        donor_mask_key: str | None = None,
        seed: int = 0,
        margin_um: float = 0.5,
        feather_um: float = 1.5,
        patch_um: float = 16.0,
        empty: str = "keep",
        keep_radius_um: float = 0.0,
        retain_prob: float = 1.0,
        block_um: float = 0.0,
        allow_missing_keys: bool = False,
        points_key: str | None = None,
        valid_key: str | None = None,
    ) -> None:
        where = (mask_key, mpp_key, donor_key, donor_mask_key)
        super().__init__(keys, *where, allow_missing_keys, points_key, valid_key)
        self.perturb = NucleiCenteredPerturb(
            ops, mpp, seed, margin_um, feather_um, patch_um, empty, keep_radius_um, retain_prob, block_um
        )

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """Perturb every key; ValueErrors name the key that does not fit."""
        return self._perturb_all(data)


class RandNucleiCenteredPerturbd(RandomizableTransform, _PerturbDict):
    """Dictionary twin of :class:`RandNucleiCenteredPerturb`; all keys are perturbed with the same seed.

    Keys, and ``mpp``, are those of :class:`NucleiCenteredPerturbd`, all else is the array transform's.
    """

    def __init__(
        self,
        keys: KeysCollection,
        ops: str | Mapping[str, Any] = "published",
        mask_key: str = "nuclei",
        mpp: float | None = None,
        mpp_key: str = "mpp",
        donor_key: str | None = None,
        donor_mask_key: str | None = None,
        margin_um: float = 0.5,
        feather_um: float = 1.5,
        patch_um: float = 16.0,
        prob: float = 1.0,
        empty: str = "keep",
        random_amount: bool | None = None,
        keep_radius_um: float | None = None,
        retain_prob: float | None = None,
        block_um: float = 0.0,
        allow_missing_keys: bool = False,
        points_key: str | None = None,
        valid_key: str | None = None,
    ) -> None:
        where = (mask_key, mpp_key, donor_key, donor_mask_key)
        _PerturbDict.__init__(self, keys, *where, allow_missing_keys, points_key, valid_key)
        amounts = (random_amount, keep_radius_um, retain_prob, block_um)
        self.perturb = RandNucleiCenteredPerturb(ops, mpp, margin_um, feather_um, patch_um, prob, empty, *amounts)
        RandomizableTransform.__init__(self, prob)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandNucleiCenteredPerturbd:
        """Set the state that seeds are drawn from."""
        super().set_random_state(seed, state)
        self.perturb.set_random_state(seed, state)
        return self

    def randomize(self, data: Any = None) -> None:
        """Draw the seed of the next perturbation."""
        self.perturb.randomize()

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        """Perturb every key; ValueErrors name the key that does not fit."""
        self.randomize()
        return self._perturb_all(data)


NucleiCenteredPerturbD = NucleiCenteredPerturbDict = NucleiCenteredPerturbd


RandNucleiCenteredPerturbD = RandNucleiCenteredPerturbDict = RandNucleiCenteredPerturbd
