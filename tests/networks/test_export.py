"""Encoders as TorchScript: the same vectors for batches of any size, whatever the attention."""

import pytest
import torch
from monai.networks.nets import ViT

from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
from cytossl_monai.networks.nets.export import learned_size
from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny

CASES = {
    "routed": lambda: Encoder(sr_vit_tiny(num_layers=1)),
    "topk": lambda: Encoder(sr_vit_tiny(num_layers=1, sparsity="topk"), pool="mean"),
    "dense": lambda: Encoder(sr_vit_tiny(num_layers=1, sparsity="none", rpe=None), pool="cls+mean"),
    "made_for_96_px": lambda: Encoder(sr_vit_tiny(num_layers=1, img_size=96)),
    "monai_vit": lambda: Encoder(
        ViT(3, 224, 32, hidden_size=48, mlp_dim=48, num_layers=1, num_heads=4, spatial_dims=2), pool="mean"
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_script_gives_the_same_for_every_batch(case, tmp_path):
    encoder = CASES[case]().eval()
    torch.jit.script(encoder).save(tmp_path / "e.ts")
    scripted = torch.jit.load(tmp_path / "e.ts").eval()
    assert scripted.encoder_hash == encoder_hash(encoder)
    side = 96 if case == "made_for_96_px" else 224
    tiles = torch.randint(0, 256, (5, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        wanted = encoder(tiles)
        for size in (1, 2, 5):
            torch.testing.assert_close(scripted(tiles[:size]), wanted[:size], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(scripted(tiles.float() / 255), wanted, atol=1e-5, rtol=1e-4)
        with pytest.raises(torch.jit.Error, match="Images must be"):
            scripted(tiles[:, :, :64])


def test_an_encoder_whose_work_depends_on_the_tile_is_refused():
    with pytest.raises(ValueError, match="drop_background cannot be exported"):
        torch.jit.script(Encoder(sr_vit_tiny(num_layers=1, drop_background={})))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("img_size", "input_size", "tile_size", "side", "sees"),
    [
        (96, None, None, 96, [96]),  # made for 96 px, nothing else is known
        (224, 64, None, 64, [64, 112]),  # larger tiles are brought down to 64
        (96, 224, 112, 112, [112, 96]),  # learned from tiles of 112 px, which are encoded as they are
        (224, 96, 512, 96, [96, 160]),  # the paper's way: 512 px brought down
        (96, None, 100, 96, [96]),  # patches of 16 px do not divide 100
    ],
)
def test_it_is_exported_for_the_tiles_that_it_learned_from(
    img_size: int, input_size: int | None, tile_size: int | None, side: int, sees: list[int]
) -> None:
    encoder = Encoder(sr_vit_tiny(num_layers=1, img_size=img_size), input_size=input_size).eval()
    encoder.meta = {} if tile_size is None else {"tile_size": tile_size}
    assert learned_size(encoder) == (side, side)
    scripted = torch.jit.script(encoder)
    for pixels in sees:
        tiles = torch.randint(0, 256, (2, 3, pixels, pixels), dtype=torch.uint8)
        with torch.no_grad():
            if pixels < side:
                with pytest.raises(torch.jit.Error, match="Images must be"):
                    scripted(tiles)
            else:
                torch.testing.assert_close(scripted(tiles), encoder(tiles), atol=1e-4, rtol=1e-3)
