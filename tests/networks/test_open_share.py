"""How much of routed attention is open, and the word about it where it is nearly all."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest

from cytossl_monai.networks.blocks.attention.reference import open_share
from cytossl_monai.networks.nets.sr_transformer import SRTransformer


@pytest.mark.parametrize(
    ("grid", "salient", "window"), [((6, 6), 32, 3), ((7, 7), 32, 3), ((4, 9), 5, 1), ((3, 3), 0, 0)]
)
def test_open_share_is_the_mean_over_draws_of_salient_patches(grid: tuple[int, int], salient: int, window: int) -> None:
    rng = np.random.default_rng(0)
    places = list(itertools.product(range(grid[0]), range(grid[1])))
    near = np.array([[max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= window for b in places] for a in places])
    shares = []
    for _ in range(300):
        chosen = np.zeros(len(places), bool)
        chosen[rng.choice(len(places), salient, replace=False)] = True
        shares.append((near | chosen).mean())
    assert open_share(grid, salient, window) == pytest.approx(np.mean(shares), abs=0.01)


def small(**settings: object) -> SRTransformer:
    return SRTransformer(3, 96, 16, 12, 24, 1, 2, sparsity="routed", **settings)  # type: ignore[arg-type]


def test_attention_that_is_dense_by_another_name_is_told() -> None:
    with pytest.warns(UserWarning, match="leaves 97% of the pairs of a 6 x 6 grid open with window 3 and 32 salient"):
        small(num_salient=32, window=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(num_salient=8, window=1)
