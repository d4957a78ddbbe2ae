"""Halving and doubling against PyTorch's own, and views of large tiles against a resize that smooths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cut_views import cut_views

from cytossl_monai.transforms.kernels.resampling import double, halve
from cytossl_monai.transforms.views.boxes import draw_boxes


@pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 1), (2, 1), (1, 5)])
def test_halving_is_a_mean_of_blocks(size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size)
    padded = F.pad(image, (0, size[1] % 2, 0, size[0] % 2), mode="replicate")
    torch.testing.assert_close(halve(image), F.avg_pool2d(padded, 2))


@pytest.mark.parametrize("size", [(4, 3), (1, 1), (1, 5), (6, 2)])
def test_doubling_is_bilinear(size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size)
    expected = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(double(image, 2 * size[0], 2 * size[1]), expected)
    torch.testing.assert_close(double(image, 2 * size[0] - 1, 2 * size[1] - 1), expected[..., :-1, :-1])


@pytest.mark.parametrize("side", [20, 33, 61, 80])
def test_views_of_large_tiles_do_not_alias(side: int) -> None:
    # Stripes of one pixel are even grey from any distance; sampled as they are, they come out as other, wider stripes.
    tile = (torch.arange(124) % 2).float().expand(2, 3, 124, -1)
    boxes = draw_boxes(torch.rand(2, 10).double(), 124, 124, (1.0, 1.0), (1.0, 1.0), flip=False, turn=False)
    view, _ = cut_views(tile, None, [boxes], [side])[0]
    torch.testing.assert_close(view, torch.full_like(view, 0.5))


def test_each_sample_is_halved_as_often_as_it_needs() -> None:
    tiles = torch.rand(4, 3, 96, 96)
    scales = torch.tensor([1.0, 0.02, 0.3, 1.0])
    boxes = draw_boxes(torch.rand(4, 10).double(), 96, 96, (1.0, 1.0), (1.0, 1.0))
    boxes.size *= scales.double().sqrt()[:, None]
    together, _ = cut_views(tiles, None, [boxes], [24])[0]
    for i in range(4):
        alone, _ = cut_views(tiles[i : i + 1], None, [boxes.of(slice(i, i + 1))], [24])[0]
        assert torch.equal(together[i], alone[0])


def test_masks_are_cut_where_they_are_wanted() -> None:
    tiles, masks = torch.rand(2, 3, 40, 40), torch.ones(2, 1, 40, 40, dtype=torch.bool)
    boxes = [draw_boxes(torch.rand(2, 10).double(), 40, 40, (0.5, 1.0), (1.0, 1.0)) for _ in range(3)]
    cut = cut_views(tiles, masks, boxes, [20, 20, 10], masked={0, 2})
    assert [None if mask is None else mask.all().item() for _, mask in cut] == [True, None, True]
    plain = cut_views(tiles, None, boxes, [20, 20, 10])
    for (with_masks, _), (without, _) in zip(cut, plain):
        torch.testing.assert_close(with_masks, without)
