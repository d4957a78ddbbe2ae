"""A convolutional stem: patch tokens from a few strided convolutions instead of one projection of whole patches."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.networks.blocks.patch_embedding import PatchEmbedding

__all__ = ["STEM_NORMS", "ConvolutionalStem", "stem_widths"]

STEM_NORMS = ("batch", "group")
_GROUP_WIDTH = 8  # channels that a group normalisation takes together


def stem_widths(patch_size: int, hidden_size: int) -> list[int]:
    """Output channels of the stem's 3 x 3 convolutions, each of which halves the image.

    The last is half as wide as a token, each before it half as wide again, but at least 16 channels, in steps of 8.

    Args:
        patch_size: side of a patch in pixels, a power of two.
        hidden_size: width of a token.

    Raises:
        ValueError: for a side that is no power of two from 2 to 64.
    """
    if patch_size not in (2, 4, 8, 16, 32, 64):
        raise ValueError(
            f"A convolutional stem halves the image at every step, so patch_size must be 2, 4, 8, 16, 32 or 64; got "
            f"{patch_size}. Set it so, or patch_embedding to 'patch'."
        )
    steps = patch_size.bit_length() - 1
    return [max(16, hidden_size >> (steps - step) >> 3 << 3) for step in range(steps)]


class ConvolutionalStem(PatchEmbedding):
    """Patch tokens from 3 x 3 convolutions of stride 2, each with normalisation and ReLU, and one of 1 x 1 at the end.

    A patch of 16 pixels at 0.5 um per pixel is as wide as a nucleus: one projection of it has to tell chromatin,
    membrane and outline apart at once, at every place that they may have in the patch. Convolutions see them at their
    own scale, and learn so from far fewer steps. The grid of tokens is that of patches of the same size, so the
    transformer above does not change.

    A token sees a little more than its patch: ``2 * patch_size - 1`` pixels a side, centred within a pixel on the
    patch.

    Paper: Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021.

    Args:
        in_channels: channels of the image.
        img_size: rows and columns of the image that the position embeddings are made for.
        patch_size: rows and columns of a patch: the stem's stride, a power of two, the same in both.
        hidden_size: width C of a token.
        num_heads: number of heads (MONAI checks that it divides ``hidden_size``).
        pos_embed_type: ``none``, ``learnable``, ``sincos`` or ``fourier``.
        dropout_rate: dropout after the position embedding.
        norm: ``batch`` (the paper's; the images of a batch then see each other while training) or ``group`` (none does,
            so that accumulated and whole batches have the same gradient; slower on a CPU).

    Raises:
        ValueError: for patches that are not square or no power of two, for another ``norm``, and where the patch does
            not divide the image.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        hidden_size: int,
        num_heads: int,
        pos_embed_type: str = "learnable",
        dropout_rate: float = 0.0,
        norm: str = "batch",
    ) -> None:
        if norm not in STEM_NORMS:
            raise ValueError(f"The stem's norm must be one of {', '.join(STEM_NORMS)}; got {norm!r}.")
        if patch_size[0] != patch_size[1]:
            raise ValueError(f"A convolutional stem has square patches; got {patch_size[0]} x {patch_size[1]}.")
        widths = stem_widths(patch_size[0], hidden_size)
        super().__init__(
            in_channels, img_size, patch_size, hidden_size, num_heads, "conv", pos_embed_type, dropout_rate
        )
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([in_channels, *widths]):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), _norm(norm, after)]
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Conv2d(widths[-1], hidden_size, 1))
        self.patch_embeddings = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def embed(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Tokens without positions.

        Args:
            x: (B, C_in, H, W).
            hidden: (B, N) bool of the patches whose pixels no token may see, in raster order: they are set to 0, the
                mean of a normalised image, before the first convolution, since tokens overlap.

        Returns:
            (B, N, C).
        """
        if hidden is not None:
            rows, cols = self.grid_size(int(x.shape[-2]), int(x.shape[-1]))
            blocks = hidden.view(len(x), 1, rows, cols).to(x.dtype)
            x = x * (1 - F.interpolate(blocks, scale_factor=self.patch_size, mode="nearest"))
        return super().embed(x)


def _norm(name: str, width: int) -> nn.Module:
    if name == "batch":
        return nn.BatchNorm2d(width)
    return nn.GroupNorm(max(1, width // _GROUP_WIDTH), width)
