"""Encoders as TorchScript: the same vectors for batches of any size, whatever the attention."""

import pytest
import torch
from monai.networks.nets import ViT

from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
from cytossl_monai.networks.nets.sr_transformer import sr_vit_tiny

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
    tiles = torch.randint(0, 256, (5, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        wanted = encoder(tiles)
        for size in (1, 2, 5):
            torch.testing.assert_close(scripted(tiles[:size]), wanted[:size], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(scripted(tiles.float() / 255), wanted, atol=1e-5, rtol=1e-4)
        with pytest.raises(torch.jit.Error, match="Images must be"):
            scripted(tiles[:, :, :96])


def test_an_encoder_whose_work_depends_on_the_tile_is_refused():
    with pytest.raises(ValueError, match="drop_background cannot be exported"):
        torch.jit.script(Encoder(sr_vit_tiny(num_layers=1, drop_background={})))
