"""How much of routed attention is open, and the word about it where it is nearly all."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch

from cytossl_monai.networks.blocks.attention.reference import open_share, reach
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention
from cytossl_monai.networks.blocks.token_layout import TokenLayout
from cytossl_monai.networks.nets.sr_presets import sr_vit_small_stem, sr_vit_tiny, sr_vit_tiny_stem
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
    with pytest.warns(
        UserWarning, match=r"topk attention leaves 94% of the pairs of a 4 x 4 grid open with num_keys 15"
    ):
        SRTransformer(3, 64, 16, 12, 24, 1, 2, sparsity="topk", num_keys=15)


def test_window_and_salient_patches_grow_with_the_grid() -> None:
    assert reach((14, 14), None, None) == (32, 3)
    assert reach((6, 9), 5, 2) == (5, 2)
    for side in (4, 6, 7, 14, 28, 64):
        assert 0.25 < open_share((side, side), *reach((side, side), None, None)) < 0.55


@pytest.mark.parametrize("make", [sr_vit_tiny, sr_vit_tiny_stem, sr_vit_small_stem])
def test_presets_grow(make: object) -> None:
    """Views of 64 px of a network made for 224: the mask that is really used, not the one of 224 px."""
    network = make(num_layers=1, sparsity="routed", save_attn=True).eval()  # type: ignore[operator]
    for side in (64, 96, 224):
        with torch.no_grad():
            network(torch.rand(1, 3, side, side))
        weights = network.blocks[0].attn.att_mat[0, 0, 1:, 1:]
        share = float((weights > 0).double().mean())
        assert share == pytest.approx(open_share((side // 16,) * 2, *reach((side // 16,) * 2, None, None)), abs=0.12)


@pytest.mark.parametrize("side", [6, 24])
def test_a_grown_reach_is_that_reach(side: int) -> None:
    """Masked matrix and tiles alike."""
    layout = TokenLayout(2, (side, side), 1, True)
    salient, window = reach((side, side), None, None)
    torch.manual_seed(0)
    grown = SparseAttention(16, 2, sparsity="routed", num_salient=None, window=None)
    fixed = SparseAttention(16, 2, sparsity="routed", num_salient=salient, window=window)
    fixed.load_state_dict(grown.state_dict())
    x = torch.randn(2, 1 + side * side, 16)
    torch.testing.assert_close(grown(x, layout), fixed(x, layout))
