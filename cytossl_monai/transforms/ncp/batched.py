"""Nuclei-Centered Perturbation of whole batches, on the device they lie on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cytossl_monai.transforms.kernels.checks import check_images, check_masks, check_mpp, check_valid
from cytossl_monai.transforms.kernels.random import draw_seeds
from cytossl_monai.transforms.ncp.perturb import perturb
from cytossl_monai.transforms.ncp.settings import NCPSettings
from cytossl_monai.transforms.nuclei.centres import NucleiCentres

__all__ = ["BatchedNCP"]


class BatchedNCP(nn.Module):
    """Perturb all but the nuclei of a batch of tiles, each sample in a way of its own.

    The module has no weights and no state: what it does follows from its settings and the seeds alone.

    Without arguments it does what is published: discs around some of the nuclei stay, all pixels outside change places.

    All arguments are those of :class:`NCPSettings`; ``empty`` may also be ``"drop"``, which leaves tiles without nuclei
    out, so that fewer samples come back (which ones, says :meth:`kept`).

    Raises:
        ValueError: for an unknown op or preset and for a number outside its range; the message names the key.

    Example:
        >>> import torch
        >>> tiles = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
        >>> masks = torch.zeros(4, 1, 64, 64, dtype=torch.bool)
        >>> masks[:, :, 20:30, 20:30] = True
        >>> out = BatchedNCP(ops="strong")(tiles, masks, mpp=0.5)
        >>> bool((out[:, :, 20:30, 20:30] == tiles[:, :, 20:30, 20:30]).all())
        True
    """

    def __init__(
        self,
        ops: str | Mapping[str, Any] = "published",
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
        super().__init__()
        if empty not in ("keep", "perturb", "drop"):
            raise ValueError(f"empty is {empty!r}; allowed is 'keep', 'perturb' or 'drop'")
        self.drop = empty == "drop"
        without = "keep" if self.drop else empty
        self.settings = NCPSettings(
            ops, margin_um, feather_um, patch_um, prob, without, random_amount, keep_radius_um, retain_prob, block_um
        )

    @staticmethod
    def kept(masks: Tensor) -> Tensor:
        """The samples that ``empty="drop"`` keeps.

        Args:
            masks: (B, 1, H, W) or (B, H, W), 1 on nuclei.

        Returns:
            (n,) int64: the rows that hold a nucleus, on the masks' device.
        """
        return (masks != 0).flatten(1).any(1).nonzero().squeeze(1)

    def forward(
        self,
        images: Tensor,
        masks: Tensor | None,
        mpp: float | Tensor | None = None,
        generator: torch.Generator | None = None,
        seeds: Tensor | None = None,
        check: bool = True,
        out: Tensor | None = None,
        nuclei: NucleiCentres | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Perturb a batch.

        Args:
            images: (B, 3 or 1, H, W), uint8 or floating point in [0, 1]; not written to.
            masks: (B, 1, H, W) or (B, H, W), bool or 0 and 1: 1 on nuclei; None where ``nuclei`` has their centres and
                discs stay.
            mpp: micrometres per pixel, one for all or one a sample; not needed where no length is in micrometres.
            generator: where the seeds come from; None takes torch's global CPU generator.
            seeds: (B,) int64, one a sample, in place of the generator. The same seed perturbs the same tile in the
                same way in any batch; only which tile ``swap`` takes its background from depends on the batch.
            check: look at the values of images and masks first, which makes a GPU wait. Shapes are looked at always.
            out: where to write, contiguous and of the shape, dtype and device of ``images``, which may be it; None
                makes a new tensor.
            nuclei: the single nuclei, where they are known; None takes the parts of the masks.
            valid: (B, 4) left, top, right and bottom of each tile's real pixels; None: all are. ``exchange`` leaves the
                rest, which is fill, as it is, and brings none of it among the real pixels.

        Returns:
            The shape (``"drop"``: with fewer samples), dtype and device of ``images``; the pixels of
            retained nuclei are bit-identical.

        Raises:
            ValueError: for images, masks, ``mpp``, seeds or ``out`` that do not fit; the message names which.
        """
        check_images(images, values=check)
        masks = check_masks(masks, images, values=check) if masks is not None or nuclei is None else None
        if masks is None and (nuclei is None or self.settings.keep_radius_um == 0):
            raise ValueError(
                "masks is missing; allowed without masks are nuclei, and discs around them (keep_radius_um)"
            )
        if nuclei is not None and nuclei.batch != len(images):
            raise ValueError(f"nuclei are those of {nuclei.batch} tiles; allowed are those of the {len(images)} images")
        batch = len(images)
        if mpp is None and not self.settings.needs_mpp:
            mpp = 1.0
        scale = check_mpp(mpp, batch)
        if seeds is None:
            seeds = draw_seeds(batch, generator)
        elif seeds.dtype != torch.int64 or tuple(seeds.shape) != (batch,):
            raise ValueError(
                f"seeds is {seeds.dtype} of the shape {tuple(seeds.shape)}; allowed is int64 of the shape ({batch},)"
            )
        if out is not None and (
            (out.shape, out.dtype, out.device) != (images.shape, images.dtype, images.device) or not out.is_contiguous()
        ):
            raise ValueError(
                f"out is {out.dtype} of the shape {tuple(out.shape)} on {out.device}; allowed is a contiguous "
                f"{images.dtype} of the shape {tuple(images.shape)} on {images.device}"
            )
        if batch == 0:
            return images.clone()
        real = check_valid(valid, batch, *images.shape[-2:])
        drawn = self.settings.draw(seeds)
        out = perturb(images, masks, scale, drawn, self.settings, out=out, nuclei=nuclei, valid=real)
        if not self.drop:
            return out
        if masks is not None:
            return out[self.kept(masks)]
        assert nuclei is not None
        return out[(nuclei.counts() > 0).nonzero().squeeze(1).to(out.device)]

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"{self.settings!r}, drop={self.drop}"
