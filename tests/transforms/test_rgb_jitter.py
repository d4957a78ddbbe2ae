"""Colour jitter in RGB against Python's own colour conversions, and turned crops against plain geometry."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
from cut_views import cut_views

from cytossl_monai.transforms.kernels.rgb import RGBJitter, jitter_rgb, turn_hue
from cytossl_monai.transforms.views.boxes import NUMBERS, draw_boxes
from cytossl_monai.transforms.views.generator import ViewGenerator


def test_hue_is_colorsys() -> None:
    image, turn = torch.rand(2, 3, 5, 4), torch.tensor([0.1, -0.4]).view(2, 1, 1)
    image[0, :, 0, 0] = 0.5  # grey has no hue
    out = turn_hue(image, turn)
    for b in range(2):
        for y in range(5):
            for x in range(4):
                hue, saturation, value = colorsys.rgb_to_hsv(*image[b, :, y, x].tolist())
                wanted = colorsys.hsv_to_rgb((hue + float(turn[b])) % 1.0, saturation, value)
                torch.testing.assert_close(out[b, :, y, x], torch.tensor(wanted), atol=1e-5, rtol=0)


def test_one_quality_at_a_time() -> None:
    image, seeds = torch.rand(64, 3, 6, 6) * 0.4 + 0.3, torch.arange(64)
    bright = jitter_rgb(image, RGBJitter(0.4, 0, 0, 0), seeds) / image
    torch.testing.assert_close(bright, bright[:, :1, :1, :1].expand_as(bright), atol=1e-4, rtol=0)
    factors = bright[:, 0, 0, 0]
    assert 0.6 <= float(factors.min()) < 0.7
    assert 1.3 < float(factors.max()) <= 1.4 + 1e-5
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = (jitter_rgb(image, RGBJitter(0, 0, 0.2, 0), seeds) * luma).sum(1)
    torch.testing.assert_close(grey, (image * luma).sum(1), atol=1e-5, rtol=0)  # saturation leaves the grey
    contrast = jitter_rgb(image, RGBJitter(0, 0.4, 0, 0), seeds)
    mean = (image * luma).sum(1).mean((1, 2)).view(-1, 1, 1, 1)
    ratio = (contrast - mean) / (image - mean)
    torch.testing.assert_close(ratio.flatten(1).median(1).values.clamp(0.6, 1.4), ratio.flatten(1).median(1).values)
    torch.testing.assert_close(jitter_rgb(image, RGBJitter(0, 0, 0, 0), seeds), image, atol=1e-6, rtol=0)
    one = jitter_rgb(image[5:6], RGBJitter(), seeds[5:6])
    assert torch.equal(one[0], jitter_rgb(image, RGBJitter(), seeds)[5])


@pytest.mark.parametrize("rotate", [0.0, 45.0, 180.0])
def test_turned_boxes_lie_within_the_tile_and_show_what_lies_there(rotate: float) -> None:
    height, width, side = 90, 120, 24
    # Two linear ramps: what a pixel of a view shows is where it lies.
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    tile = torch.stack([x / width, y / height, torch.zeros_like(x)]).unsqueeze(0).expand(200, -1, -1, -1)
    drawn = torch.rand(200, NUMBERS, dtype=torch.float64)
    boxes = draw_boxes(drawn, height, width, (0.05, 0.9), (0.75, 1.33), rotate=rotate)
    view = cut_views(tile, None, [boxes], [side])[0][0]
    line = (torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5
    angles = []
    for b in range(200):
        right, down = boxes.sides[b, :, 0], boxes.sides[b, :, 1]
        assert float(right @ down) == pytest.approx(0, abs=1e-6)  # turned, not sheared
        torch.testing.assert_close(torch.stack([right.norm(), down.norm()]).sort().values, boxes.size[b].sort().values)
        angles.append(math.degrees(math.atan2(float(right[1]), float(right[0]))))
        at = boxes.centre[b] + line.view(1, -1, 1) * right + line.view(-1, 1, 1) * down
        assert (at >= -1e-6).all()
        assert (at <= torch.tensor([width, height]) + 1e-6).all()
        shown = torch.stack([view[b, 0] * width, view[b, 1] * height], -1).double()
        inner = (at > 2).all(-1) & (at < torch.tensor([width - 2, height - 2])).all(-1)
        torch.testing.assert_close(shown[inner], at[inner], atol=0.6, rtol=0)
    off = [abs((a + 45) % 90 - 45) for a in angles]
    assert max(off) < 1e-6 if rotate == 0 else max(off) > 40


def test_options_of_the_views_are_checked() -> None:
    for settings, message in (
        ({"rotate": 200}, "rotate is 200"),
        ({"rgb_jitter": (0.4, 0.4, 0.2, 0.7)}, "hue"),
        ({"nucleus_prob": (1.0, 0.5, 0.2)}, "nucleus_prob"),
        ({"nucleus_prob": 1.2}, "nucleus_prob is 1.2"),
        ({"centre_on": "cells"}, "centre_on"),
        ({"ncp_views": "some"}, "tile, all, global, local"),
    ):
        with pytest.raises(ValueError, match=message):
            ViewGenerator(**settings)
    tiles = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    views = ViewGenerator(32, 16, n_local=1, find_nuclei=False, rotate=45, rgb_prob=1.0)(tiles)
    assert all(0 <= float(v.min()) <= float(v.max()) <= 1 for v in views["global"] + views["local"])
