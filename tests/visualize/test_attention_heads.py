"""The heads' attention as colours and as numbers, against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import small_vit

from cytossl_monai.networks.blocks.attention.reference import reference_attention
from cytossl_monai.networks.blocks.token_layout import TokenLayout
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.networks.nets.resnet import ResNetFeatures
from cytossl_monai.visualize.attention_heads import (
    class_attention,
    draw_attention_heads,
    head_masses,
    paint_heads,
    tissue_parts,
)


def small(**kwargs: object) -> Encoder:
    return Encoder(small_vit(hidden_size=12, mlp_dim=24, num_register_tokens=1, **kwargs))


def test_class_attention_is_the_last_layers() -> None:
    encoder = small(sparsity="topk", keep_ratio=0.5)
    images = torch.rand(2, 3, 32, 32)
    ours = class_attention(encoder, images)
    network = encoder.network
    tokens, layout, _ = network._embed(encoder.normalise(images)[1])
    tokens = network.blocks[0](tokens, layout)
    attention = network.blocks[1].attn
    qkv = attention.qkv(network.blocks[1].norm1(tokens)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    weights = reference_attention(*qkv, TokenLayout(2, (4, 4), 2), sparsity="topk", keep_ratio=0.5)[1][:, :, 0, 2:]
    wanted = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(ours.flatten(2), wanted)
    assert not attention.save_attn
    assert encoder.training  # as it was


def test_masses_are_the_loops() -> None:
    attention = torch.rand(2, 3, 4, 5)
    attention /= attention.sum((-2, -1), keepdim=True)
    nuclei = torch.rand(2, 1, 16, 20) > 0.7
    parts = {"nuclei": nuclei, "rest": ~nuclei, "none": torch.zeros_like(nuclei)}
    figures = head_masses(attention, parts)
    for b in range(2):
        for h in range(3):
            mass = 0.0
            for r in range(4):
                for c in range(5):
                    patch = nuclei[b, 0, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
                    mass += float(attention[b, h, r, c]) * float(patch.float().mean())
            assert float(figures["nuclei"][b, h]) == pytest.approx(mass, abs=1e-5)
            area = float(nuclei[b].float().mean())
            assert float(figures["nuclei_gain"][b, h]) == pytest.approx(mass / area, rel=1e-4)
    torch.testing.assert_close(figures["nuclei"] + figures["rest"], torch.ones(2, 3))
    assert figures["none_gain"].isnan().all()


def test_parts_cover_every_pixel_once() -> None:
    images = torch.full((1, 3, 16, 16), 0.95)
    images[:, :, 4:12, 4:12] = 0.6
    nuclei = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    nuclei[:, :, 6:8, 6:8] = True
    parts = tissue_parts(images, nuclei)
    assert torch.equal(sum(part.int() for part in parts.values()), torch.ones(1, 1, 16, 16, dtype=torch.int32))
    assert int(parts["cytoplasm"].sum()) == 60


def test_paint_shows_the_strongest_patches_in_the_heads_colour(tmp_path) -> None:
    attention = np.full((3, 4, 4), 0.01, np.float32)
    attention[0, 0, 0] = attention[1, 3, 3] = attention[2, 0, 3] = 1.0
    image = np.full((3, 32, 32), 128, np.uint8)
    painted = paint_heads(image, attention, share=1 / 16)
    assert painted[0, 2, 2] > painted[1, 2, 2]
    assert painted[1, 30, 30] > painted[0, 30, 30]
    assert painted[2, 2, 30] > painted[0, 2, 30]
    assert (painted[:, 16, 16] == 128).all()
    path = draw_attention_heads(tmp_path / "heads.png", np.stack([image, image]), {"plain": np.stack([attention] * 2)})
    assert Image.open(path).size == (2 * 40 + 8, 32 + 2 * 40)


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="class token"):
        class_attention(Encoder(ResNetFeatures()), torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="heads are"):
        paint_heads(np.zeros((3, 8, 8), np.uint8), np.ones((2, 2, 2), np.float32), heads=(0, 2))
    with pytest.raises(ValueError, match="share"):
        paint_heads(np.zeros((3, 8, 8), np.uint8), np.ones((2, 2, 2), np.float32), heads=(0,), share=0.0)
