"""Views of tiles one by one, as tests look at them; the generator cuts those of one side together."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from cytossl_monai.transforms.views.boxes import CropBoxes, cut_together, view_groups


def cut_views(
    tiles: Tensor,
    masks: Tensor | None,
    boxes: list[CropBoxes],
    sizes: list[int],
    masked: Collection[int] | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """Cut several views of each tile, image and mask in one resampling.

    Args:
        tiles: (B, C, H, W), uint8 or floating point in [0, 1].
        masks: (B, 1, H, W) bool; None cuts no masks.
        boxes: where to cut, one for each view.
        sizes: side of each view in pixels.
        masked: indices of the views whose masks are wanted; None wants all.

    Returns:
        For each view: (B, C, side, side) float32 in [0, 1], and (B, 1, side, side) bool or None.
    """
    wanted = range(len(sizes)) if masked is None else masked
    groups = view_groups(sizes, wanted, tiles.device)
    views: list[tuple[Tensor, Tensor | None]] = []
    for cut, masks_cut in cut_together(tiles, masks, boxes, sizes, groups, wanted):
        of_view = [None] * len(cut) if masks_cut is None else list(masks_cut.unbind())
        views += zip(cut.unbind(), of_view, strict=True)
    return views
