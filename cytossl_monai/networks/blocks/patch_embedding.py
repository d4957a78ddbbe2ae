"""Patch embedding with MONAI's parameters, for any input size that the patch divides."""

from __future__ import annotations

import torch.nn.functional as F
from monai.networks.blocks.patchembedding import PatchEmbeddingBlock
from torch import Tensor

__all__ = ["PatchEmbedding", "resize_position_embeddings"]


def resize_position_embeddings(
    embeddings: Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool = False, offset: float = 0.0
) -> Tensor:
    """Position embeddings of one grid for another, by bicubic interpolation.

    Args:
        embeddings: (1, old rows * old columns, C).
        old: rows and columns of the grid they are for.
        new: rows and columns wanted.
        antialias: low-pass before the table is made smaller, as timm and DINOv2 with registers do.
        offset: added to the new rows and columns where the sampling distance is worked out; DINO and DINOv2 without
            registers take 0.1.

    Returns:
        (1, new rows * new columns, C), the same tensor where the grids are the same.
    """
    if old == new:
        return embeddings
    grid = embeddings.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    if offset:
        scale = [(n + offset) / o for n, o in zip(new, old)]
        resized = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False, antialias=antialias)
        if tuple(resized.shape[-2:]) != new:
            raise ValueError(f"An offset of {offset} makes {tuple(resized.shape[-2:])} positions of {old}, not {new}.")
    else:
        resized = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    return resized.to(embeddings.dtype).flatten(2).transpose(1, 2)


class PatchEmbedding(PatchEmbeddingBlock):
    """MONAI's 2D `PatchEmbeddingBlock` that also takes other sizes, and gives patches and positions apart.

    Args:
        in_channels: channels of the image.
        img_size: rows and columns of the image that the position embeddings are made for.
        patch_size: rows and columns of a patch.
        hidden_size: width C of a token.
        num_heads: number of heads (MONAI checks that it divides ``hidden_size``).
        proj_type: ``conv`` or ``perceptron``.
        pos_embed_type: ``none``, ``learnable``, ``sincos`` or ``fourier``.
        dropout_rate: dropout after the position embedding.

    Raises:
        ValueError: where the patch does not divide the image.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        hidden_size: int,
        num_heads: int,
        proj_type: str = "conv",
        pos_embed_type: str = "learnable",
        dropout_rate: float = 0.0,
    ) -> None:
        if any(p < 1 or i < p or i % p for i, p in zip(img_size, patch_size)):
            raise ValueError(f"patch_size {patch_size} must divide img_size {img_size}.")
        super().__init__(
            in_channels, img_size, patch_size, hidden_size, num_heads, proj_type, pos_embed_type, dropout_rate, 2
        )
        self.patch_size = patch_size
        self.grid = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])
        if pos_embed_type == "none":  # MONAI trains a table of zeros here; there is nothing to train
            self.position_embeddings.requires_grad_(False)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image.

        Raises:
            ValueError: where the patch does not divide the image.
        """
        rows, cols = self.patch_size
        if height < rows or width < cols or height % rows or width % cols:
            raise ValueError(f"An image of {height} x {width} pixels does not divide into patches of {rows} x {cols}.")
        return height // rows, width // cols

    def embed(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W) -> (B, N, C), without positions; ``hidden`` (B, N) is for embeddings whose tokens overlap."""
        x = self.patch_embeddings(x)
        return x.flatten(2).transpose(-1, -2) if self.proj_type == "conv" else x

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (1, N, C) for a grid."""
        return resize_position_embeddings(self.position_embeddings, self.grid, grid)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, N, C), with positions and dropout."""
        grid = self.grid_size(int(x.shape[-2]), int(x.shape[-1]))
        out: Tensor = self.dropout(self.embed(x) + self.positions(grid))
        return out
