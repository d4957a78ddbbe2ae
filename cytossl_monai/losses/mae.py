"""Masked pixel regression: the loss of the masked autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cytossl_monai.losses.precision import full_precision, widen

__all__ = ["MaskedPixelLoss", "patchify"]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, row by row.

    Args:
        images: (B, C, H, W).
        patch_size: P, a divisor of H and W.

    Returns:
        (B, N, P * P * C), N = (H / P) * (W / P); in a patch, rows, then columns, then channels.

    Raises:
        ValueError: when the sides are not multiples of ``patch_size``.
    """
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"image sides {height} x {width} are not multiples of the patch size {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


class MaskedPixelLoss(nn.Module):
    """Mean squared error on the pixels of hidden patches.

    Paper: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, section 3.

    Args:
        normalise: subtract the mean of each target patch and divide by its standard deviation. Local contrast then
            counts, not brightness: published as better for what the encoder learns.
        eps: added to the variance; a patch of blank glass has none.
    """

    def __init__(self, normalise: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.normalise = normalise
        self.eps = eps

    @full_precision
    def forward(self, predictions: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
        """Loss over the hidden patches.

        Args:
            predictions: (B, N, V) float.
            patches: (B, N, V) float, the image, see :func:`patchify`.
            mask: (B, N) bool, true where hidden, with the same number hidden in each image.

        Returns:
            scalar, the mean over hidden patches and their pixels.

        Raises:
            ValueError: when the shapes do not fit together.
        """
        if predictions.shape != patches.shape or mask.shape != patches.shape[:2]:
            raise ValueError(
                f"predictions and patches must both be (B, N, V) and mask (B, N), got {tuple(predictions.shape)}, "
                f"{tuple(patches.shape)} and {tuple(mask.shape)}"
            )
        hidden = mask.nonzero(as_tuple=True)  # once: a GPU is waited for each time that a mask is an index
        targets = widen(patches)[hidden]
        if self.normalise:
            variance, mean = torch.var_mean(targets, dim=-1, keepdim=True)
            targets = (targets - mean) / (variance + self.eps).sqrt()
        return (widen(predictions)[hidden] - targets).square().mean()
