"""What is particular to a method, written out a second time."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from small_methods import small_method
from tiny_encoders import TinyConv, TinyViT, coloured_views

from cytossl_monai.losses.mae import patchify
from cytossl_monai.methods.parts.mae_decoder import sincos_positions


def test_simclr_normalises_both_views_together() -> None:
    method = small_method("simclr", TinyConv())
    views = coloured_views()
    reference = copy.deepcopy(method)
    loss = method(views)["loss"]
    projected = F.normalize(reference.projector(reference.student(torch.cat(views["global"]))), dim=1)
    logits = projected @ projected.T / 0.1
    logits.fill_diagonal_(-math.inf)
    expected = F.cross_entropy(logits, torch.arange(16).roll(8))
    assert torch.allclose(loss, expected)


def test_byol_predicts_the_other_view() -> None:
    method = small_method("byol", TinyViT())
    first, second = (views := coloured_views())["global"]
    reference = copy.deepcopy(method)
    out = method(views)

    def predict(view: torch.Tensor) -> torch.Tensor:
        return F.normalize(reference.predictor(reference.projector(reference.student(view))), dim=1)

    def target(view: torch.Tensor) -> torch.Tensor:
        return F.normalize(reference.teacher_projector(reference.teacher(view)), dim=1)

    cosine = (predict(first) * target(second)).sum(1).mean() + (predict(second) * target(first)).sum(1).mean()
    assert torch.allclose(out["loss"], 4 - 2 * cosine, atol=1e-6)
    assert torch.allclose(out["cosine"], cosine / 2, atol=1e-6)


def test_dino_pairs_every_student_view_with_the_other_teacher_views() -> None:
    method = small_method("dino", TinyViT())
    views = coloured_views(local=3)
    crops = views["global"] + views["local"]
    with torch.no_grad():
        targets = [torch.softmax(method.teacher_head(method.teacher(v)) / 0.04, 1) for v in views["global"]]
        students = [torch.log_softmax(method.head(method.student(v)) / 0.1, 1) for v in crops]
    pairs = [-(targets[t] * students[s]).sum(1).mean() for t in range(2) for s in range(5) if s != t]
    out = method(views)
    assert torch.allclose(out["loss"], torch.stack(pairs).mean(), atol=1e-5)
    assert out["teacher_entropy"] <= math.log(32)
    assert torch.allclose(out["features"], method.teacher(views["global"][0]), atol=1e-6)


def test_ibot_compares_hidden_patches_of_the_same_view() -> None:
    method = small_method("ibot", TinyViT())
    views = coloured_views(local=2)
    reference = copy.deepcopy(method)
    out = method(views)
    mask = reference._draw_masks(8, 2, torch.cat(views["global"]))
    assert torch.equal(reference.samples.seen, method.samples.seen)
    total = torch.zeros(())
    with torch.no_grad():
        for number, view in enumerate(views["global"]):
            hidden = mask[number * 8 : number * 8 + 8]
            _, seen = reference.teacher.forward_tokens(view)
            _, guessed = reference.student.forward_tokens(view, mask=hidden, mask_token=reference.mask_token)
            target = torch.softmax(reference.teacher_head(seen) / 0.04, -1)
            guess = torch.log_softmax(reference.head(guessed) / 0.1, -1)
            per_patch = -(target * guess).sum(-1)
            for image in range(8):
                if hidden[image].any():
                    total += per_patch[image][hidden[image]].mean() / 16
    assert torch.allclose(out["patch_loss"], total, atol=1e-5)
    assert out["masked"] == mask.float().mean()


def test_ibot_masks_change_from_step_to_step_and_not_in_evaluation() -> None:
    method = small_method("ibot", TinyViT())
    images = torch.rand(16, 3, 32, 32)
    first, second = method._draw_masks(8, 2, images), method._draw_masks(8, 2, images)
    assert not torch.equal(first, second)
    method.eval()
    assert torch.equal(method._draw_masks(8, 2, images), method._draw_masks(8, 2, images))


def test_koleo_spreads_embeddings() -> None:
    plain, spread = (
        small_method("dinov2", copy.deepcopy(encoder), koleo_weight=weight)
        for encoder in [TinyViT()]
        for weight in (0.0, 5.0)
    )
    views = coloured_views(local=2)
    for method in (plain, spread):
        optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-3)
        for _ in range(15):
            optimiser.zero_grad()
            method(views)["loss"].backward()
            optimiser.step()
    nearest = []
    for method in (plain, spread):
        with torch.no_grad():
            embedded = F.normalize(method.student(views["global"][0]), dim=1)
        nearest.append(torch.cdist(embedded, embedded).fill_diagonal_(9).min(1).values.mean())
    assert nearest[1] > nearest[0]


def test_mae_learns_from_hidden_patches_only() -> None:
    method = small_method("mae", TinyViT())
    views = coloured_views(views=1)
    reference = copy.deepcopy(method)
    out = method(views)
    image = views["global"][0]
    keep = reference._draw(8, 1, 16, None, image.device)
    assert keep.shape == (8, 4)
    with torch.no_grad():
        cls, patches = reference.student.forward_tokens(image, keep=keep)
        predicted = reference.decoder(cls, patches, keep, (4, 4))
    target = patchify((image - 0.5) / 0.25, 8)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = [
        (predicted[b, n] - target[b, n]).square().mean()
        for b in range(8)
        for n in range(16)
        if n not in keep[b].tolist()
    ]
    assert torch.allclose(out["loss"], torch.stack(errors).mean(), atol=1e-5)


def test_mask_bias_moves_the_holes() -> None:
    shares = {}
    for bias in (-3.0, 0.0, 3.0):
        method = small_method("mae_nuclei", TinyViT(), mask_bias=bias)
        shares[bias] = torch.stack([method(coloured_views())["masked_nuclei"] for _ in range(10)]).mean().item()
    assert shares[-3.0] < 0.5
    assert shares[0.0] == pytest.approx(0.75, abs=0.06)
    assert shares[3.0] > 0.9
    views = coloured_views()
    del views["nuclei"]
    with pytest.raises(ValueError, match=r"mask_bias is 3\.0, but the views hold no nuclei"):
        method(views)


def test_decoder_positions_are_distinct_and_split_by_axis() -> None:
    positions = sincos_positions(3, 5, 16).view(3, 5, 16)
    assert torch.equal(positions[1, 0, :8], positions[1, 4, :8])
    assert torch.equal(positions[0, 2, 8:], positions[2, 2, 8:])
    assert len(torch.unique(positions.view(15, 16), dim=0)) == 15
    assert positions[0, 1, 8].item() == pytest.approx(math.sin(1))
    assert positions[0, 1, 9].item() == pytest.approx(math.sin(10000 ** (-1 / 4)), abs=1e-6)
