"""LoRA: nothing changes at first, little is trained, and what is merged computes the same."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import small_vit

from cytossl_monai.networks.files import load_encoder, save_encoder
from cytossl_monai.networks.lora import add_lora, has_lora, merge_lora
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.networks.nets.sr_transformer import SRTransformer


def network() -> SRTransformer:
    return small_vit(mlp_dim=48, qkv_bias=True)


def test_starts_as_it_was_and_trains_a_small_part() -> None:
    plain, images = network().eval(), torch.rand(2, 3, 32, 32)
    before, weights = plain(images)[0], {n: p.clone() for n, p in plain.state_dict().items()}
    changed = add_lora(plain, rank=2)
    torch.testing.assert_close(changed(images)[0], before)
    trained = [p for p in changed.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < 0.2 * sum(p.numel() for p in changed.parameters())
    torch.optim.SGD(trained, 0.1).zero_grad()
    optimizer = torch.optim.SGD(trained, 0.1)
    for _ in range(2):  # the first step moves `up` alone: `down` has no gradient while `up` is zero
        optimizer.zero_grad()
        changed(images)[0].square().mean().backward()
        optimizer.step()
    attention = changed.blocks[0].attn
    assert torch.equal(attention.qkv.parametrizations.weight.original, weights["blocks.0.attn.qkv.weight"])
    low = attention.qkv.parametrizations.weight[0]
    wanted = weights["blocks.0.attn.qkv.weight"] + 8.0 * low.up @ low.down
    torch.testing.assert_close(attention.qkv.weight, wanted)
    assert not torch.equal(attention.qkv.weight, weights["blocks.0.attn.qkv.weight"])


def test_merged_is_a_plain_network_and_files_hold_that(tmp_path) -> None:
    encoder = Encoder(add_lora(network(), rank=2))
    torch.nn.init.normal_(encoder.network.blocks[1].attn.qkv.parametrizations.weight[0].up)
    encoder.eval()
    images = torch.rand(2, 3, 32, 32)
    merged = merge_lora(encoder)
    assert has_lora(encoder)
    assert not has_lora(merged)
    assert set(merged.state_dict()) == set(Encoder(network()).state_dict())
    torch.testing.assert_close(merged(images), encoder(images))
    save_encoder(tmp_path / "model.pt", encoder)
    loaded, _ = load_encoder(tmp_path / "model.pt")
    torch.testing.assert_close(loaded(images), encoder(images))


def test_bad_settings_are_told() -> None:
    with pytest.raises(ValueError, match="rank"):
        add_lora(network(), rank=0)
    with pytest.raises(ValueError, match="this network has linear1"):
        add_lora(network(), layers=("attention",))
