"""Which patches count as blank glass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cytossl_monai.networks.blocks.background import foreground_patches


def tile(glass: float = 0.93) -> torch.Tensor:
    """(1, 3, 32, 32) of glass with a cell on patches 5 and 6 of 4 x 4, pale in all channels but green."""
    image = torch.full((1, 3, 32, 32), glass)
    image[:, 1, 8:16, 8:24] = glass * 0.5
    return image


def found(image: torch.Tensor, **arguments: Any) -> list[int]:
    return foreground_patches(image, (8, 8), **arguments)[0].nonzero().flatten().tolist()


def test_finds_the_cell_whatever_the_lamp() -> None:
    for glass in (1.0, 0.93, 0.8):
        assert found(tile(glass)) == [5, 6]


def test_threshold_is_a_mean_optical_density() -> None:
    """A quarter of a patch at half the light: a mean density of log10(2) / 4."""
    image = torch.full((1, 3, 32, 32), 0.9)
    image[:, :, :4, :4] = 0.45
    density = math.log10(2) / 4
    assert found(image, threshold=density - 0.001) == [0]
    with pytest.raises(ValueError, match="blank"):
        found(image, threshold=density + 0.001)


def test_glass_of_the_slide_shows_a_tile_that_is_all_cell() -> None:
    """By itself a tile without glass takes its own brightest colour for it; the slide knows better."""
    image = torch.full((1, 3, 32, 32), 0.75)
    assert found(image, glass=(0.95, 0.95, 0.95)) == list(range(16))
    with pytest.raises(ValueError, match="blank"):
        found(image)


def test_a_dark_tile_has_no_glass() -> None:
    assert found(torch.full((1, 3, 32, 32), 0.4)) == list(range(16))


def test_images_do_not_see_each_other() -> None:
    batch = torch.cat([tile(0.95), tile(0.8).roll(8, dims=2)])
    together = foreground_patches(batch, (8, 8))
    for row, image in zip(together, batch):
        assert torch.equal(row, foreground_patches(image[None], (8, 8))[0])


def test_blank_images_are_named_or_keep_their_darkest_patch() -> None:
    blank = torch.full((1, 3, 32, 32), 0.93)
    blank[:, :, 24:, :8] -= 0.01
    batch = torch.cat([tile(), blank])
    with pytest.raises(ValueError, match=r"\[1\] are blank at threshold 0\.06"):
        foreground_patches(batch, (8, 8))
    kept = foreground_patches(batch, (8, 8), on_blank="darkest")
    assert [row.nonzero().flatten().tolist() for row in kept] == [[5, 6], [12]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"threshold": 0.0}, "threshold must be above 0; got 0.0"),
        ({"on_blank": "skip"}, "'error' or 'darkest'; got 'skip'"),
        ({"images": tile() * 2 - 1}, "not normalised"),
        ({"images": tile() * 255}, "reach from .* to 237"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        foreground_patches(**{"images": tile(), "patch_size": (8, 8), **arguments})
