"""LESS against a plain loop over its description, and what it refuses. Order and padding: test_mil_methods."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cytossl_monai.networks.mil.cytology.less import LESS


def attend(module, asking: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Multi-head attention of (Q, C) to (L, C), a loop over heads and queries."""
    q, k, v = module.query(asking), module.key(asked), module.value(asked)
    width = q.shape[1] // module.n_heads
    rows, shares = [], torch.zeros(len(asking), len(asked))
    for i in range(len(asking)):
        parts = []
        for h in range(module.n_heads):
            at = slice(h * width, (h + 1) * width)
            raw = torch.stack([q[i, at] @ k[j, at] / math.sqrt(width) for j in range(len(asked))])
            weight = raw.exp() / raw.exp().sum()
            shares[i] += weight / module.n_heads
            parts.append(sum(w * v[j, at] for j, w in enumerate(weight)))
        rows.append(module.out(torch.cat(parts)))
    return torch.stack(rows), shares


def by_hand(model: LESS, bag: Tensor) -> tuple[Tensor, Tensor]:
    half = bag.shape[1] // 2
    scales = [torch.cat([model.class_tokens[s, 0], model.embed[s](bag[:, s * half : (s + 1) * half])]) for s in (0, 1)]
    for block in model.blocks:
        for s in (0, 1):
            for layer in block.scales[s]:
                normed = layer.norm1(scales[s])
                scales[s] = scales[s] + attend(layer.attention, normed, normed)[0]
                scales[s] = scales[s] + layer.mlp(layer.norm2(scales[s]))
        classes, given = [], []
        for s in (0, 1):
            cross = block.cross[s]
            visitor = cross.there(scales[s][:1])
            joined = cross.norm(torch.cat([visitor, scales[1 - s][1:]]))
            read, shares = attend(cross.attention, joined[:1], joined)
            classes.append(scales[s][:1] + cross.back(visitor + read))
            given.append(shares[0, 1:])
        scales = [torch.cat([c, t[1:]]) for c, t in zip(classes, scales)]
    logits = sum(model.classifiers[s](model.norms[s](scales[s][0])) for s in (0, 1)) / 2
    total = given[0] + given[1]
    return logits, total / total.sum()


def test_less_is_its_description() -> None:
    model = LESS(12, 3, embed_dim=8, n_heads=2, n_blocks=2, depths=(1, 2)).eval()
    bag = torch.randn(7, 12)
    logits, attention = by_hand(model, bag)
    output = model(bag.unsqueeze(0))
    torch.testing.assert_close(output.logits[0], logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.attention[0], attention, atol=1e-5, rtol=1e-4)


def test_both_scales_count() -> None:
    model = LESS(12, 2, embed_dim=8, n_heads=2).eval()
    bag = torch.randn(1, 5, 12)
    for half in (slice(0, 6), slice(6, 12)):
        other = bag.clone()
        other[..., half] += 1.0
        assert not torch.allclose(model(bag).logits, model(other).logits)


def test_one_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="two_scales"):
        LESS(13, 2)
    with pytest.raises(ValueError, match="two_scales"):
        LESS(384, 2, feature_scales=1)
    with pytest.raises(ValueError, match="depths"):
        LESS(12, 2, depths=(0, 1))
