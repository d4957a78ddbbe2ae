"""Nuclei-Centered Perturbation: MONAI transforms for one tile, and a module for whole batches on their device.

All of them draw from one seed a sample and run the same kernels, so a tile is perturbed alike by each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from monai.config.type_definitions import NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.meta_obj import get_track_meta
from monai.transforms import RandomizableTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor
from torch import Tensor

from cytossl_monai.transforms.kernels.checks import check_images, check_masks, check_mpp, check_valid
from cytossl_monai.transforms.ncp.batched import BatchedNCP
from cytossl_monai.transforms.ncp.perturb import perturb
from cytossl_monai.transforms.ncp.settings import NCPSettings
from cytossl_monai.transforms.nuclei.centres import NucleiCentres

__all__ = ["BatchedNCP", "NucleiCenteredPerturb", "RandNucleiCenteredPerturb"]


def _plain(data: NdarrayOrTensor) -> Tensor:
    """An array or tensor as a plain tensor, without a copy where one can be avoided."""
    tensor = data.as_tensor() if isinstance(data, MetaTensor) else torch.as_tensor(data)
    return tensor.detach()


def perturb_one(
    img: NdarrayOrTensor,
    mask: NdarrayOrTensor | None,
    mpp: float | None,
    seed: int,
    settings: NCPSettings,
    donor: NdarrayOrTensor | None,
    donor_mask: NdarrayOrTensor | None,
    keys: tuple[str, str, str, str] = ("img", "mask", "donor", "donor_mask"),
    points: NdarrayOrTensor | None = None,
    valid: NdarrayOrTensor | Sequence[float] | None = None,
) -> Tensor:
    """One tile through the batched kernels; ``keys`` are what messages call the inputs."""
    tensor = convert_to_tensor(img, track_meta=get_track_meta())
    image = _plain(tensor)
    check_images(image, keys[0], dims=3)
    mask, nuclei = _nuclei(mask, points, image, settings, keys[1])
    if mpp is None and isinstance(img, MetaTensor):
        mpp = img.meta.get("mpp")
    if mpp is None and not settings.needs_mpp:
        mpp = 1.0
    scale = check_mpp(mpp, 1)
    donors = donor_masks = None
    if donor is not None:
        other = _plain(donor).to(image.device)
        check_images(other, keys[2], dims=3)
        if other.shape != image.shape or other.dtype != image.dtype:
            raise ValueError(
                f"{keys[2]} is {other.dtype} of the shape {tuple(other.shape)}; allowed is what {keys[0]} is: "
                f"{image.dtype} of the shape {tuple(image.shape)}"
            )
        donors = other.unsqueeze(0)
        donor_masks = None if donor_mask is None else check_masks(_plain(donor_mask), other, keys[3]).unsqueeze(0)
    draw = settings.draw(torch.tensor([seed], dtype=torch.int64), own_donors=donor is not None)
    real = check_valid(valid, 1, *image.shape[-2:])
    out = perturb(image.unsqueeze(0), mask, scale, draw, settings, donors, donor_masks, nuclei=nuclei, valid=real)[0]
    return convert_to_dst_type(out, tensor)[0]


def _nuclei(
    mask: NdarrayOrTensor | None, points: NdarrayOrTensor | None, image: Tensor, settings: NCPSettings, key: str
) -> tuple[Tensor | None, NucleiCentres | None]:
    """The mask (1, 1, H, W) bool and the single nuclei of a tile, from a mask, an instance map or points.

    Raises:
        ValueError: where neither a mask nor points are given, or points do without discs.
    """
    centres = None if points is None else NucleiCentres.of_points([_plain(points)])
    if mask is None:
        if centres is None or settings.keep_radius_um == 0:
            raise ValueError(
                f"{key} is missing; allowed without it are points, with discs around them (keep_radius_um)"
            )
        return None, centres
    plain = _plain(mask)
    if settings.by_nucleus and not plain.is_floating_point() and plain.dtype != torch.bool and plain.numel():
        plain = plain.unsqueeze(0) if plain.ndim == 2 else plain
        if int(plain.max()) > 1 and int(plain.min()) >= 0:  # an instance map: touching nuclei stay apart
            check_masks(plain > 0, image, key)
            instances = plain.unsqueeze(0).to(image.device)
            return instances > 0, NucleiCentres.of_instances(instances) if centres is None else centres
    return check_masks(plain, image, key).unsqueeze(0), centres


class NucleiCenteredPerturb(Transform):
    """Perturb all but the nuclei of a tile, always in the same way.

    Arguments that are not listed are those of :class:`NCPSettings`; the nuclei and their margin stay, unless
    ``keep_radius_um`` is set.

    Args:
        ops: ``{name: strength}`` with strengths in [0, 1]; every op that is named acts, with its whole strength.
            ``swap`` needs a donor.
        mpp: micrometres per pixel of tiles that do not state their own.
        seed: decides the noise, and where patches and rectangles lie.

    Raises:
        ValueError: for an unknown op and for a number outside its range; the message names the key.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.TORCH]

    def __init__(
        self,
        ops: Mapping[str, float],
        mpp: float | None = None,
        seed: int = 0,
        margin_um: float = 0.5,
        feather_um: float = 1.5,
        patch_um: float = 16.0,
        empty: str = "keep",
        keep_radius_um: float = 0.0,
        retain_prob: float = 1.0,
        block_um: float = 0.0,
    ) -> None:
        if not isinstance(ops, Mapping):
            raise ValueError(f"ops is {ops!r}; allowed is a mapping of op names to strengths in [0, 1]")
        always = {name: {"prob": 1.0, "strength": strength} for name, strength in ops.items()}
        self.settings = NCPSettings(
            always, margin_um, feather_um, patch_um, 1.0, empty, False, keep_radius_um, retain_prob, block_um
        )
        self.mpp = None if mpp is None else float(check_mpp(mpp, 1))
        self.seed = int(seed)

    def __call__(
        self,
        img: NdarrayOrTensor,
        mask: NdarrayOrTensor | None = None,
        mpp: float | None = None,
        donor: NdarrayOrTensor | None = None,
        donor_mask: NdarrayOrTensor | None = None,
        points: NdarrayOrTensor | None = None,
        valid: NdarrayOrTensor | Sequence[float] | None = None,
    ) -> Tensor:
        """Perturb a tile.

        Args:
            img: (3 or 1, H, W), uint8 or floating point in [0, 1]; not written to.
            mask: (1, H, W) or (H, W), bool or 0 and 1: 1 on nuclei; where discs stay or a part is retained also an
                instance map (0 background, 1, 2, ... nuclei); None with ``points``.
            mpp: micrometres per pixel; None takes the constructor's, then ``img.meta["mpp"]``.
            donor: another tile of the same shape and dtype, whose background ``swap`` takes; None leaves ``swap`` out.
            donor_mask: the donor's nuclei, which are painted over; None takes the donor as it is.
            points: (n, 2) x and y of the nuclei in pixels, of a detector; None takes the parts of the mask.
            valid: (4,) left, top, right and bottom of the real pixels; None: all are. ``exchange`` leaves the fill be.

        Returns:
            A new tensor of the same shape and dtype, with the metadata of a MetaTensor.

        Raises:
            ValueError: for inputs that do not fit; the message names which.
        """
        scale = self.mpp if mpp is None else mpp
        return perturb_one(img, mask, scale, self.seed, self.settings, donor, donor_mask, points=points, valid=valid)


class RandNucleiCenteredPerturb(RandomizableTransform):
    """Perturb all but the nuclei of a tile, in a way drawn anew at each call.

    The seed that was drawn stays in ``self.seed``: :class:`BatchedNCP` makes the same pixels of the same seed.

    Arguments that are not listed are those of :class:`NCPSettings`.

    Args:
        mpp: micrometres per pixel of tiles that do not state their own.

    Raises:
        ValueError: for an unknown op or preset and for a number outside its range; the message names the key.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.TORCH]

    def __init__(
        self,
        ops: str | Mapping[str, Any] = "published",
        mpp: float | None = None,
        margin_um: float = 0.5,
        feather_um: float = 1.5,
        patch_um: float = 16.0,
        prob: float = 1.0,
        empty: str = "keep",
        random_amount: bool | None = None,
        keep_radius_um: float | None = None,
        retain_prob: float | None = None,
        block_um: float = 0.0,
    ) -> None:
        self.settings = NCPSettings(  # refuses prob outside [0, 1]
            ops, margin_um, feather_um, patch_um, prob, empty, random_amount, keep_radius_um, retain_prob, block_um
        )
        RandomizableTransform.__init__(self, prob)
        self.mpp = None if mpp is None else float(check_mpp(mpp, 1))
        self.seed = 0

    def randomize(self, data: Any = None) -> None:
        """Draw the seed of the next perturbation."""
        self.seed = int(self.R.randint(0, 1 << 62, dtype=np.int64))
        # Whether the tile is perturbed follows from the seed, so that a batch of the same seed decides alike.
        self._do_transform = bool(self.settings.perturbs(torch.tensor([self.seed]))[0])

    def __call__(
        self,
        img: NdarrayOrTensor,
        mask: NdarrayOrTensor | None = None,
        mpp: float | None = None,
        donor: NdarrayOrTensor | None = None,
        donor_mask: NdarrayOrTensor | None = None,
        randomize: bool = True,
        points: NdarrayOrTensor | None = None,
        valid: NdarrayOrTensor | Sequence[float] | None = None,
    ) -> Tensor:
        """Perturb a tile as :meth:`NucleiCenteredPerturb.__call__` does, of a seed drawn anew.

        ``randomize=False`` repeats what ``self.seed`` decides.
        """
        if randomize:
            self.randomize()
        scale = self.mpp if mpp is None else mpp
        return perturb_one(img, mask, scale, self.seed, self.settings, donor, donor_mask, points=points, valid=valid)
