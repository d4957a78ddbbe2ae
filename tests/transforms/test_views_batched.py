"""ViewGenerator: shapes, seeds, and masks that go where the colours go."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from cytossl_monai.transforms.ncp.batched import BatchedNCP
from cytossl_monai.transforms.views.generator import ViewGenerator


def nucleus_tiles(batch: int = 4, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright tiles with one dark square each, and where it is."""
    tiles = torch.full((batch, 3, size, size), 220, dtype=torch.uint8)
    masks = torch.zeros(batch, 1, size, size, dtype=torch.bool)
    for i in range(batch):
        at = 8 + 7 * i
        tiles[i, :, at : at + 14, at : at + 14] = 30
        masks[i, :, at : at + 14, at : at + 14] = True
    return tiles, masks


def plain(**kwargs: object) -> ViewGenerator:
    settings = {"global_size": 32, "local_size": 16, "n_local": 3, "stain_prob": 0.0, "blur_prob": 0.0}
    return ViewGenerator(**{**settings, **kwargs})


def test_shapes_types_and_ranges() -> None:
    tiles, masks = nucleus_tiles()
    before = tiles.clone()
    out = ViewGenerator(32, 16, n_local=3, ncp=BatchedNCP("strong"), ncp_views="all")(tiles, 0.5, masks)
    assert [tuple(v.shape) for v in out["global"]] == [(4, 3, 32, 32)] * 2
    assert [tuple(v.shape) for v in out["local"]] == [(4, 3, 16, 16)] * 3
    assert [tuple(v.shape) for v in out["nuclei"]] == [(4, 1, 32, 32)] * 2
    for view in out["global"] + out["local"]:
        assert view.dtype == torch.float32
        assert 0 <= view.min() <= view.max() <= 1
    assert torch.equal(tiles, before)


def test_same_generator_same_views() -> None:
    tiles, masks = nucleus_tiles()
    make = ViewGenerator(32, 16, n_local=2, ncp=BatchedNCP("strong"), ncp_views="all")
    first, again, other = (make(tiles, 0.5, masks, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    for key in ("global", "local", "nuclei"):
        assert all(torch.equal(a, b) for a, b in zip(first[key], again[key]))
    assert not torch.equal(first["global"][0], other["global"][0])


def test_the_mask_goes_where_the_nucleus_goes() -> None:
    tiles, masks = nucleus_tiles(16)
    out = plain()(tiles, 0.5, masks)
    for view, nuclei in zip(out["global"], out["nuclei"]):
        dark = view[:, :1] < 0.5 * (220 + 30) / 255
        assert (dark != nuclei).float().mean() < 1e-3
        assert nuclei.any()


def test_ncp_acts_on_the_chosen_views_alone() -> None:
    tiles, masks = nucleus_tiles()
    noise = BatchedNCP({"noise": {"prob": 1.0, "strength": 1.0}}, margin_um=0, feather_um=0)
    off, on = (
        plain(ncp=ncp, ncp_views=(1,))(tiles, 0.5, masks, torch.Generator().manual_seed(0)) for ncp in (None, noise)
    )
    assert torch.equal(off["global"][0], on["global"][0])
    assert all(torch.equal(a, b) for a, b in zip(off["local"], on["local"]))
    inside = on["nuclei"][1].expand(-1, 3, -1, -1)
    assert torch.equal(off["global"][1][inside], on["global"][1][inside])
    assert not torch.equal(off["global"][1], on["global"][1])


def test_centred_local_views_show_nuclei() -> None:
    tiles, masks = nucleus_tiles(8, 96)
    views = plain(nucleus_prob=1.0, local_scale=(0.02, 0.03))(tiles, 0.5, masks)["local"]
    assert all((view.amin((1, 2, 3)) < 0.5).all() for view in views)


@pytest.mark.parametrize(("prob", "same"), [(1.0, 1.0), (0.0, None)])
def test_global_views_meet_at_one_nucleus(prob: float, same: float | None) -> None:
    # Nine nuclei of nine colours far from the border: the colour at a view's middle tells which one it was cut around.
    tile, mask = torch.full((3, 192, 192), 230, dtype=torch.uint8), torch.zeros(1, 192, 192, dtype=torch.bool)
    for number in range(9):
        y, x = 40 + 48 * (number // 3), 40 + 48 * (number % 3)
        tile[:, y : y + 16, x : x + 16], mask[:, y : y + 16, x : x + 16] = 12 * number, True
    views = plain(n_local=0, same_nucleus_prob=prob, global_scale=(0.05, 0.15))
    first, second = views(tile.expand(64, -1, -1, -1), 0.5, mask.expand(64, -1, -1, -1))["global"]
    middle = [view[:, 0, 14:18, 14:18].amin((1, 2)) for view in (first, second)]
    agree = ((middle[0] - middle[1]).abs() < 6 / 255).float().mean()
    assert (agree == same) if same is not None else (agree < 0.7)
    assert len(middle[0].mul(255 / 12).round().unique()) > 5, "it is always the same nucleus"


def test_drop_empty_leaves_tiles_out_of_all_views() -> None:
    tiles, masks = nucleus_tiles()
    masks[1] = False
    out = plain(drop_empty=True)(tiles, torch.full((4,), 0.5), masks)
    assert out["kept"].tolist() == [0, 2, 3]
    assert {len(v) for v in out["global"] + out["local"] + out["nuclei"]} == {3}
    assert len(plain(drop_empty=True)(tiles, 0.5, torch.zeros_like(masks))["kept"]) == 4


def test_ncp_that_drops_is_refused() -> None:
    with pytest.raises(ValueError, match="drop"):
        ViewGenerator(ncp=BatchedNCP(empty="drop"))


def test_tiles_with_metadata_make_the_same_views() -> None:
    tiles, masks = nucleus_tiles()
    make = ViewGenerator(32, 16, n_local=2, ncp=BatchedNCP("strong"), ncp_views="all", blur_prob=1.0)
    plain, tracked, found = (
        make(t, 0.5, m, torch.Generator().manual_seed(1))
        for t, m in ((tiles, masks), (MetaTensor(tiles), MetaTensor(masks)), (MetaTensor(tiles), None))
    )
    assert not any(isinstance(view, MetaTensor) for view in tracked["global"] + found["local"])
    for key in ("global", "local", "nuclei"):
        assert all(torch.equal(a, torch.as_tensor(b)) for a, b in zip(plain[key], tracked[key]))
