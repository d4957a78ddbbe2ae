"""Random tiles of a slide: seeded, spread, none over another."""

import logging

import numpy as np
import pytest
import torch

from cytossl_monai.data.bags.choice import TilesPerSlided, choose_tiles


def test_tiles_never_overlap_and_depend_on_seed_and_slide_alone():
    rng = np.random.default_rng(0)
    coords = rng.integers(0, 3000, (800, 2))
    rows = choose_tiles(coords, 200, 60, "a")
    chosen = coords[rows]
    for i in range(len(chosen)):
        for j in range(i):
            assert (np.abs(chosen[i] - chosen[j]) >= 200).any()
    np.testing.assert_array_equal(rows, choose_tiles(coords, 200, 60, "a"))
    assert not np.array_equal(rows, choose_tiles(coords, 200, 60, "b"))
    assert not np.array_equal(rows, choose_tiles(coords, 200, 60, "a", seed=1))


def test_a_grid_gives_the_number_asked_for_each_tile_alike():
    x, y = np.meshgrid(np.arange(10) * 512, np.arange(10) * 512)
    coords = np.stack([x.ravel(), y.ravel()], 1)
    counts = np.zeros(100)
    for seed in range(400):
        rows = choose_tiles(coords, 512, 25, "a", seed)
        assert len(set(rows.tolist())) == 25
        counts[rows] += 1
    assert 60 < counts.min() <= counts.max() < 140  # 100 expected, deviation 9


def test_transform_takes_features_and_places_alike_and_says_once(caplog):
    item = {"slide_id": "s", "features": torch.arange(40.0).view(20, 2), "coords": torch.arange(40).view(20, 2) * 10}
    kept = TilesPerSlided(5)({**item, "tile_size": 4})
    assert kept["features"].shape == (5, 2)
    torch.testing.assert_close(kept["coords"].float(), kept["features"] * 10)
    transform = TilesPerSlided(100)
    with caplog.at_level(logging.WARNING):
        assert len(transform(item)["features"]) == 20
        transform({**item, "slide_id": "t"})
    assert [r.getMessage() for r in caplog.records if "fewer than" in r.getMessage()] == [
        "slide s has 20 tiles, fewer than tiles_per_slide 100: all are taken, and so of others like it"
    ]
    assert len(TilesPerSlided(None)(item)["features"]) == 20
    with pytest.raises(ValueError, match="tiles_per_slide"):
        TilesPerSlided(0)
