"""MAE: reconstruct hidden patches from the visible quarter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.losses.mae import MaskedPixelLoss, patchify
from cytossl_monai.methods.base import SSLMethod, Views, require_tokens, token_width
from cytossl_monai.methods.parts.mae_decoder import MAEDecoder
from cytossl_monai.methods.parts.masking import SampleCounter, kept_patches

__all__ = ["MAE"]


class MAE(SSLMethod):
    """Masked autoencoder: the encoder sees a quarter of the patches, a small decoder predicts the pixels of the rest.

    **What NCP means here.** Contrastive methods learn from what two views agree on; NCP makes sure that only nuclei
    do. MAE compares no views: it learns what is needed to fill the holes, and hence *where the holes are* decides what
    it learns. With uniform holes on cytology, most of the loss is paid for glass and plain cytoplasm. ``mask_bias``
    moves the holes, at the same number of them:

    - ``mask_bias > 0`` hides nuclei more often. The loss is then about nuclei: shape, chromatin and size have to be
      inferred from the cell around them and from other nuclei. This is the counterpart of NCP's "learn from nuclei".
    - ``mask_bias < 0`` hides background more often. The encoder then mostly sees nuclei, as behind NCP's perturbation,
      but is paid for drawing background around them. It trains the encoder on nuclei as input, at less reward.
    - ``mask_bias = 0`` is the paper.

    The bias is a log-odds: a patch all nucleus is kept visible with ``exp(-mask_bias)`` times the weight of one
    without any, patches in between in proportion. With 2 to 3 a nucleus is nearly always hidden, yet never surely: the
    encoder has to see some nuclei to embed them later. View generators' NCP (perturbed backgrounds) can be on as well,
    but then the decoder is to paint perturbations; leave it off for MAE.

    Every global view is used on its own; give it one per image.

    Paper: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.

    Args:
        encoder: a ViT or SR-Transformer in an ``Encoder`` (``forward_tokens`` with ``keep``).
        mask_ratio: share of patches hidden.
        decoder_dim: width of the decoder.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        normalise_target: normalise the pixels of each target patch, see ``MaskedPixelLoss``.
        mask_bias: see above; needs ``views["nuclei"]`` unless 0.
        seed: of the masks.

    Raises:
        ValueError: for a mask ratio outside (0, 1), or an encoder without tokens, such as ResNet-50.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalise_target: bool = True,
        mask_bias: float = 0.0,
        seed: int = 0,
    ) -> None:
        require_tokens(encoder, "MAE")
        super().__init__(encoder)
        if not 0.0 < mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must lie in (0, 1), got {mask_ratio}")
        self.patch_size = _square(self.student.patch_size)
        self.decoder = MAEDecoder(
            token_width(encoder), self.patch_size**2 * 3, decoder_dim, decoder_depth, decoder_heads
        )
        self.loss = MaskedPixelLoss(normalise_target)
        self.samples = SampleCounter()
        self.mask_ratio, self.mask_bias, self.seed = mask_ratio, mask_bias, seed

    def forward(self, views: Views) -> dict[str, Tensor]:
        """Loss of all global views; see :class:`SSLMethod`.

        ``masked_nuclei`` is the share of nucleus area that is hidden, where nuclei are given.

        Raises:
            ValueError: when ``mask_bias`` is not 0 and ``views`` has no nuclei.
        """
        crops = self.global_views(views, 1)
        images = torch.cat(crops)
        grid = self.student.grid_size(*images.shape[-2:])
        nuclei = self._nuclei_share(views, len(crops))
        keep = self._draw(len(crops[0]), len(crops), grid[0] * grid[1], nuclei, images.device)
        mask = torch.ones(len(images), grid[0] * grid[1], dtype=torch.bool, device=images.device)
        mask.scatter_(1, keep, False)
        cls, patches = self.student.forward_tokens(images, keep=keep)
        predictions = self.decoder(cls, patches, keep, grid)
        loss = self.loss(predictions, patchify(self._normalised(images), self.patch_size), mask)
        out = {"loss": loss, "pixel": loss.detach(), "features": cls[: len(crops[0])].detach()}
        if nuclei is not None:
            out["masked_nuclei"] = (nuclei * mask).sum() / nuclei.sum().clamp_min(1e-6)
        return out

    def _draw(self, batch: int, views: int, patches: int, nuclei: Tensor | None, device: torch.device) -> Tensor:
        kept = max(1, round(patches * (1.0 - self.mask_ratio)))
        hiding = None if nuclei is None or self.mask_bias == 0 else self.mask_bias * nuclei
        return kept_patches(self.samples.take(batch), batch, views, patches, kept, self.seed, device, hiding)

    def _nuclei_share(self, views: Views, count: int) -> Tensor | None:
        """(V * B, N) share of nucleus area of each patch, or None where no nuclei are given."""
        masks = list(views.get("nuclei", ()))[:count]
        if not masks:
            if self.mask_bias != 0:
                raise ValueError(
                    f"mask_bias is {self.mask_bias}, but the views hold no nuclei: let the view generator find them, "
                    "or set mask_bias to 0"
                )
            return None
        return F.avg_pool2d(torch.cat(masks).float(), self.patch_size).flatten(1)

    def _normalised(self, images: Tensor) -> Tensor:
        """The pixels that the encoder sees: the loss is in its units, as published."""
        mean, std = (getattr(self.student, name).view(1, 3, 1, 1) for name in ("mean", "std"))
        return (images - mean) / std


def _square(patch_size: int | tuple[int, ...]) -> int:
    sides = {patch_size} if isinstance(patch_size, int) else set(patch_size)
    if len(sides) != 1:
        raise ValueError(f"MAE needs square patches, got {patch_size}")
    return int(sides.pop())
