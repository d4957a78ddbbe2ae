"""Crops centred on nuclei."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd

from cytossl_monai.transforms.views.array import RandCropAtNucleus
from cytossl_monai.transforms.views.dictionary import RandCropAtNucleusd


def sample(size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose pixels tell their place, and two nuclei: one large, one small."""
    image = torch.arange(size * size, dtype=torch.float32).view(1, size, size)
    mask = torch.zeros(1, size, size)
    mask[:, 10:30, 10:30] = 1
    mask[:, 45:48, 50:53] = 1
    return image, mask


def test_window_is_centred_on_each_nucleus_alike() -> None:
    image, mask = sample()
    crop = RandCropAtNucleus(9).set_random_state(0)
    seen = Counter(int(crop(image, mask)[0, 4, 4]) for _ in range(200))
    middle = {round(19.5) * 64 + round(19.5), 46 * 64 + 51}
    assert set(seen) == middle
    assert min(seen.values()) > 60  # twenty times the area, and no more likely


def test_window_stays_in_the_tile_at_full_size() -> None:
    image, mask = sample()
    crop = RandCropAtNucleus((40, 20), jitter=8).set_random_state(1)
    for _ in range(50):
        assert crop(image, mask).shape == (1, 40, 20)


def test_jitter_stays_within_its_bounds() -> None:
    image, mask = sample()
    mask[:, :40] = 0
    crop = RandCropAtNucleus(9, jitter=3).set_random_state(1)
    centres = {divmod(int(crop(image, mask)[0, 4, 4]), 64) for _ in range(300)}
    assert {y for y, _ in centres} == set(range(43, 50))
    assert {x for _, x in centres} == set(range(48, 55))


def test_instance_map_parts_touching_nuclei() -> None:
    image, mask = sample()
    mask[:] = 0
    mask[:, 20:30, 20:30] = 1
    mask[:, 20:30, 30:40] = 2
    crop = RandCropAtNucleus(5).set_random_state(0)
    assert len({int(crop(image, mask)[0, 2, 2]) for _ in range(40)}) == 2
    assert len({int(crop(image, (mask > 0).float())[0, 2, 2]) for _ in range(40)}) == 1


def test_fallbacks() -> None:
    image, mask = sample()
    empty = torch.zeros_like(mask)
    center = RandCropAtNucleus(10, fallback="center")(image, empty)
    assert int(center[0, 0, 0]) == 27 * 64 + 27
    anywhere = RandCropAtNucleus(10).set_random_state(0)
    assert len({int(anywhere(image, empty)[0, 0, 0]) for _ in range(20)}) > 10
    with pytest.raises(ValueError, match="no nucleus"):
        RandCropAtNucleus(10, fallback="error")(image, empty)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"roi_size": 0}, "roi_size"),
        ({"roi_size": 4, "jitter": -1}, "jitter"),
        ({"roi_size": 4, "fallback": "x"}, "fallback"),
    ],
)
def test_bad_settings(kwargs: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        RandCropAtNucleus(**kwargs)


def test_bad_masks() -> None:
    image, mask = sample()
    with pytest.raises(ValueError, match="pad it first"):
        RandCropAtNucleus(65)(image, mask)
    with pytest.raises(ValueError, match="mask has the size"):
        RandCropAtNucleus(5)(image, mask[:, :32])
    with pytest.raises(ValueError, match="whole numbers"):
        RandCropAtNucleus(5)(image, mask * 0.5)
    with pytest.raises(ValueError, match="mask is missing"):
        RandCropAtNucleus(5)(image)
    with pytest.raises(ValueError, match="nuclei is missing"):
        RandCropAtNucleusd("image", 5)({"image": image})
    with pytest.raises(ValueError, match="cells has the shape"):
        RandCropAtNucleusd("image", 5, mask_key="cells")({"image": image, "cells": torch.zeros(3, 64, 64)})


def test_keys_are_cropped_alike_and_inverted() -> None:
    image, mask = sample()
    data = {"image": MetaTensor(image), "nuclei": MetaTensor(mask)}
    crop = RandCropAtNucleusd(["image", "nuclei"], 16).set_random_state(3)
    out = crop(data)
    where = int(out["image"][0, 0, 0])
    y, x = divmod(where, 64)
    assert torch.equal(out["nuclei"].as_tensor(), mask[:, y : y + 16, x : x + 16])
    assert out["image"].affine[0, 3] == y
    assert out["image"].affine[1, 3] == x
    back = crop.inverse(out)["image"]
    assert back.shape == image.shape
    assert torch.equal(back.as_tensor()[:, y : y + 16, x : x + 16], image[:, y : y + 16, x : x + 16])


def test_lazy_equals_eager() -> None:
    image, mask = sample()
    data = {"image": MetaTensor(image), "nuclei": MetaTensor(mask)}

    def steps() -> list[object]:
        return [
            Flipd(["image", "nuclei"], 0),
            RandCropAtNucleusd(["image", "nuclei"], 16),
            Flipd(["image", "nuclei"], 1),
        ]

    eager = Compose(steps()).set_random_state(8)(data)
    lazy = Compose(steps(), lazy=True).set_random_state(8)(data)
    torch.testing.assert_close(lazy["image"].as_tensor(), eager["image"].as_tensor(), atol=1e-2, rtol=0)
    assert torch.equal(lazy["nuclei"].as_tensor() > 0.5, eager["nuclei"].as_tensor() > 0.5)
