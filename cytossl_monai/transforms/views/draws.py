"""All random numbers of a batch of views, drawn at once: from a generator on a GPU they come in one copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cytossl_monai.transforms.views.boxes import NUMBERS

__all__ = ["DrawnViews", "draw_views"]

_SEED_LIMIT = 1 << 62


@dataclass(frozen=True)
class DrawnViews:
    """What was drawn for a batch of B tiles; all on the CPU, where it is decided what is cut and changed.

    Attributes:
        tile_seeds: (B,) int64 in [0, 2**62), of what is done to the tiles before they are cut; None where nothing is.
        shared: (B, 2) float64 in [0, 1), of what a tile's global views share.
        crops: for each view (B, `NUMBERS` + 2) float64 in [0, 1): the crop, whether it is centred, on which nucleus.
        seeds: for each view (2, B) int64 in [0, 2**62): of its perturbation, and of its colours.
    """

    tile_seeds: Tensor | None
    shared: Tensor
    crops: list[Tensor]
    seeds: list[Tensor]

    def colour_seeds(self) -> Tensor:
        """(V, B) int64: the seeds of the views' colours."""
        none = torch.zeros(0, len(self.shared), dtype=torch.int64)
        return torch.stack([both[1] for both in self.seeds]) if self.seeds else none


def draw_views(batch: int, views: int, tile_seeds: bool, generator: torch.Generator | None = None) -> DrawnViews:
    """Draw.

    Args:
        batch: number of tiles.
        views: views of each tile.
        tile_seeds: whether anything is done to the tiles before they are cut.
        generator: where the numbers come from (any device); None takes torch's global CPU generator.
    """
    device = torch.device("cpu") if generator is None else generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device=device)

    def seeds(*shape: int) -> Tensor:
        return torch.randint(0, _SEED_LIMIT, shape, generator=generator, device=device)

    # The order is part of what a seed means: new numbers go to the end.
    first = [seeds(batch)] if tile_seeds else []
    numbers = [uniform(batch, 2), *(uniform(batch, NUMBERS + 2) for _ in range(views))]
    last = [seeds(2, batch) for _ in range(views)]
    drawn = [*first, *numbers, *last]
    if device.type != "cpu":  # as 64 bits each, whatever they stand for: the host waits once
        flat = torch.cat([part.view(torch.int64).flatten() for part in drawn]).cpu()
        parts = flat.split([part.numel() for part in drawn])
        drawn = [part.view(like.dtype).view(like.shape) for part, like in zip(parts, drawn, strict=True)]
    own, rest = drawn[: len(first)], drawn[len(first) :]
    return DrawnViews(own[0] if own else None, rest[0], rest[1 : 1 + views], rest[1 + views :])
