"""Where the tokens of a batch lie on their grids: what attention must know beside queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["TokenLayout"]

T = TypeVar("T")


def _rows_and_cols(flat: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Grid row and column of flat grid positions."""
    return torch.div(flat, width, rounding_mode="floor"), flat % width


@torch.library.custom_op("cytossl::grid_places", mutates_args=())
def _compiled_grid_places(rows: int, cols: int, device: torch.device) -> Tensor:
    """Grid row and column of the patches, (2, rows * cols) int64, as a step that ``torch.compile`` does not look into.

    Where it does, it works out buckets of pairs as formulas of their places, and its CUDA backend (PyTorch 2.11) fails
    over those of a prefix token: "The argument '-((((-1))//14)) + ((((0))//14))' is not comparable".
    """
    return torch.stack(_rows_and_cols(torch.arange(rows * cols, device=device), cols))


@_compiled_grid_places.register_fake
def _(rows: int, cols: int, device: torch.device) -> Tensor:
    return torch.empty(2, rows * cols, dtype=torch.int64, device=device)


@dataclass
class TokenLayout:
    """Places of tokens, in one of two forms.

    *Batched*: tokens (B, P + N, C), the same number in every image; `positions` None means the full grid in raster
    order, otherwise (B, N) flat grid positions; `valid` (B, N) marks patches that take part (None: all do).

    *Packed*: tokens (sum of P + n_b, C), the images' sequences one after the other, each with its own number n_b of
    patches; `counts` holds the n_b and `positions` (sum n_b,) the flat grid positions.

    Args:
        batch: number of images B.
        grid: rows and columns of the patch grid.
        num_prefix: P, tokens before the patches (class token first, then registers).
        has_class_token: whether the first prefix token is the class token.
        positions: int64, see above.
        valid: bool, see above; batched form only.
        counts: patches of each image; packed form only.
    """

    batch: int
    grid: tuple[int, int]
    num_prefix: int
    has_class_token: bool = True
    positions: Tensor | None = None
    valid: Tensor | None = None
    counts: list[int] | None = None
    _memory: dict[object, object] = field(default_factory=dict, repr=False)

    @property
    def packed(self) -> bool:
        """Whether sequences of different lengths lie one after the other."""
        return self.counts is not None

    @property
    def num_patches(self) -> int:
        """Patches of each image in the batched form."""
        return self.grid[0] * self.grid[1] if self.positions is None else int(self.positions.shape[-1])

    def remember(self, key: object, make: Callable[[], T]) -> T:
        """What ``make`` returns, computed once for all layers of one forward pass."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]  # type: ignore[return-value]

    def rows_and_cols(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Grid rows and columns of the patches: each (N,) for the full grid, else of the shape of `positions`."""
        height, width = self.grid
        if self.positions is not None:
            return _rows_and_cols(self.positions, width)
        # On a GPU alone: what is exported on a CPU is to need nothing of this package to be loaded.
        if torch.compiler.is_dynamo_compiling() and device.type == "cuda":
            rows, cols = _compiled_grid_places(height, width, device).unbind()
            return rows, cols
        return _rows_and_cols(torch.arange(height * width, device=device), width)

    def offsets(self) -> list[int]:
        """First row of each image's sequence among packed tokens, and the total: B + 1 numbers."""
        if self.counts is None:
            raise ValueError("offsets() is for the packed form.")
        out = [0]
        for count in self.counts:
            out.append(out[-1] + self.num_prefix + count)
        return out

    def patch_rows(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every patch that takes part, as rows of the tokens flattened to (-1, C).

        Returns:
            (row, image, grid row, grid column), each int64 (number of patches,), ordered by image.
        """
        grid_row, grid_col = self.rows_and_cols(device)
        prefix = self.num_prefix
        if self.counts is not None:
            counts = torch.tensor(self.counts, device=device)
            image = torch.repeat_interleave(torch.arange(self.batch, device=device), counts)
            row = torch.arange(image.shape[0], device=device) + (image + 1) * prefix
            return row, image, grid_row, grid_col
        n = self.num_patches
        image = torch.arange(self.batch, device=device).unsqueeze(1).expand(self.batch, n)
        row = image * (prefix + n) + prefix + torch.arange(n, device=device)
        grid_row, grid_col = grid_row.expand(self.batch, n), grid_col.expand(self.batch, n)
        parts = (row, image, grid_row, grid_col)
        if self.valid is not None:
            return tuple(part[self.valid] for part in parts)  # type: ignore[return-value]
        return tuple(part.reshape(-1) for part in parts)  # type: ignore[return-value]

    def key_mask(self) -> Tensor | None:
        """(B, P + N) bool of the tokens that take part, or None when all do (batched form)."""
        if self.valid is None:
            return None
        ones = self.valid.new_ones(self.valid.shape[0], self.num_prefix)
        return torch.cat([ones, self.valid], dim=1)
