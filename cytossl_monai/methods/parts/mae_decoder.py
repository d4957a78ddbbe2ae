"""The light decoder of the masked autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MAEDecoder", "sincos_positions"]


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed position embeddings of a grid: sines and cosines, half of the width for rows, half for columns.

    Args:
        rows: of the grid.
        columns: of the grid.
        width: a multiple of 4.

    Returns:
        (rows * columns, width) float32.

    Raises:
        ValueError: when ``width`` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"the width of 2D sine-cosine positions must be a multiple of 4, got {width}")
    rates = torch.exp(-torch.arange(width // 4, dtype=torch.float64) * (4.0 / width) * torch.log(torch.tensor(10000.0)))

    def line(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    by_row = line(rows)[:, None].expand(rows, columns, -1)
    by_column = line(columns)[None].expand(rows, columns, -1)
    return torch.cat([by_row, by_column], dim=-1).reshape(rows * columns, width).float()


class MAEDecoder(nn.Module):
    """Transformer that fills in hidden patches: narrow and shallow beside the encoder, and thrown away afterwards.

    Paper: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.

    Args:
        in_dim: width of the encoder's tokens.
        patch_values: numbers predicted per patch, ``P * P * 3``.
        width: of the decoder.
        depth: blocks.
        num_heads: attention heads.

    Raises:
        ValueError: when ``width`` is no multiple of 4 and of ``num_heads``.
    """

    def __init__(self, in_dim: int, patch_values: int, width: int = 512, depth: int = 8, num_heads: int = 16) -> None:
        super().__init__()
        if width % 4 or width % num_heads:
            raise ValueError(f"decoder width {width} must be a multiple of 4 and of its {num_heads} heads")
        self.enter = nn.Linear(in_dim, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, patch_values)
        self._positions: dict[tuple[int, int], Tensor] = {}

    def forward(self, cls: Tensor, patches: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predict all patches.

        Args:
            cls: (B, in_dim) class token of the encoder.
            patches: (B, K, in_dim) tokens of the visible patches.
            keep: (B, K) int64, which patches these are.
            grid: rows and columns of all patches.

        Returns:
            (B, rows * columns, patch_values).
        """
        visible = self.enter(torch.cat([cls[:, None], patches], dim=1))
        batch, width = len(visible), visible.shape[-1]
        everywhere = self.mask_token.to(visible.dtype).expand(batch, grid[0] * grid[1], width)
        filled = everywhere.scatter(1, keep[..., None].expand(-1, -1, width), visible[:, 1:])
        filled = filled + self._positions_of(grid, width, filled.device).to(filled.dtype)
        tokens = torch.cat([visible[:, :1], filled], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.predict(self.norm(tokens[:, 1:]))

    def _positions_of(self, grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
        cached = self._positions.get(grid)
        if cached is None or cached.device != device:
            cached = self._positions[grid] = sincos_positions(*grid, width).to(device)
        return cached
