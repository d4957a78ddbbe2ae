"""Nearest reference cells: distances against scikit-learn, own cells left out, and what a file keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from cytossl_monai.networks.build import build_network, network_config
from cytossl_monai.networks.mil.cytology.reference import ReferenceBank
from cytossl_monai.networks.mil.targets import MILLoss


def cohort(seed: int = 0, slides: int = 6, tiles: int = 40, dim: int = 8) -> list[tuple[torch.Tensor, int]]:
    """Slides of correlated benign tiles; every second one holds two odd ones."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(3, dim, generator=torch.Generator().manual_seed(9))
    bags = []
    for number in range(slides):
        features = torch.randn(tiles, 3, generator=generator) @ basis + 0.1 * torch.randn(
            tiles, dim, generator=generator
        )
        if number % 2:
            features[:2] += torch.randn(2, dim, generator=generator)
        bags.append((features, number % 2))
    return bags


def taught(bags: list[tuple[torch.Tensor, int]], **options: object) -> ReferenceBank:
    model = ReferenceBank(bags[0][0].shape[1], **options)  # type: ignore[arg-type]
    every = torch.cat([features for features, _ in bags])
    model.set_standardisation(every.mean(dim=0), every.std(dim=0))
    model.learn_bags(bags)
    return model.eval()


@pytest.mark.parametrize("neighbours", [1, 3])
def test_distances_are_those_of_scikit_learn(neighbours: int) -> None:
    """Slides of one size, so that weighing slides and weighing tiles alike are the same; no shrinkage to speak of."""
    bags = cohort()
    model = taught(bags, n_neighbours=neighbours, shrinkage=1e-9, top_share=0.05)
    mean, std = model.feature_mean.numpy(), model.feature_std.numpy()
    standard = [((features.numpy() - mean) / std).astype(np.float64) for features, _ in bags]
    negative = np.concatenate(standard[::2])
    pca = PCA(whiten=True).fit(negative)
    factor = np.sqrt((len(negative) - 1) / len(negative))  # scikit-learn divides by n - 1
    known = NearestNeighbors(n_neighbors=neighbours).fit(pca.transform(negative) / factor)
    new = cohort(seed=1, slides=2)[1][0]
    wanted = known.kneighbors(pca.transform((new.numpy() - mean) / std) / factor)[0].mean(axis=1)
    score = np.sort(wanted)[-2:].mean()  # 0.05 of 40 tiles
    output = model(new[None])
    z = (wanted - float(model.score_mean)) / float(model.score_std)
    np.testing.assert_allclose(output.scores[0, :, 1].detach(), z / 2, rtol=2e-3, atol=2e-3)
    slide = (score - float(model.score_mean)) / float(model.score_std)
    assert float((output.logits[0, 1] - output.logits[0, 0]).detach()) == pytest.approx(slide, rel=2e-3)
    torch.testing.assert_close(output.attention[0], torch.softmax(torch.tensor(z).float(), 0), rtol=2e-2, atol=1e-4)


def test_a_slide_of_the_bank_is_judged_by_the_others() -> None:
    bags = cohort()
    model = taught(bags)
    without = ReferenceBank(8)
    without.load_state_dict(model.state_dict())
    without.bank, without.bank_slides = model.bank[40:], model.bank_slides[40:]  # the first slide's tiles are gone
    own = model(bags[0][0][None])
    torch.testing.assert_close(own.logits, without.eval()(bags[0][0][None]).logits)
    assert (
        float(own.scores[0, :, 1].min().detach()) > -float(model.score_mean / model.score_std) / 2 + 1e-3
    )  # no distance of 0
    half = model(bags[0][0][None, 10:25])  # known by a part of its tiles as well
    torch.testing.assert_close(half.scores, own.scores[:, 10:25])


def test_positive_slides_are_told_and_slope_and_offset_learn() -> None:
    bags = cohort(slides=12)
    model = taught(bags).train()
    features, labels = torch.stack([x for x, _ in bags]), torch.tensor([label for _, label in bags])
    optimizer, loss = torch.optim.Adam(model.parameters(), 0.05), MILLoss(model)
    first = float(loss(model(features), labels).detach())
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(model(features), labels)
        value.backward()
        optimizer.step()
    assert float(value.detach()) < first
    new = cohort(seed=5, slides=40)
    logits = model.eval()(torch.stack([x for x, _ in new])).logits[:, 1].detach()
    assert float((logits[1::2, None] > logits[None, ::2]).float().mean()) > 0.9  # the AUC


def test_negative_slides_alone_train_without_moving_anything() -> None:
    bags = cohort()[::2]
    model = taught(bags).train()
    loss = MILLoss(model)(model(torch.stack([x for x, _ in bags])), torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert [float(p.grad) for p in model.parameters()] == [0.0, 0.0]
    logits = model.eval()(torch.stack([x for x, _ in bags])).logits
    assert float((logits[:, 1] - logits[:, 0]).mean()) == pytest.approx(0.0, abs=1e-4)  # standardised by them


def test_the_bank_is_drawn_alike_from_slides_and_a_file_keeps_it() -> None:
    bags = cohort()
    bags[0] = (torch.cat([bags[0][0]] * 5), 0)
    model = taught(bags, bank_size=30)
    assert model.bank_slides.bincount().tolist() == [10, 10, 10]
    again = build_network(network_config(model)).eval()
    again.load_state_dict(model.state_dict())
    new = cohort(seed=2)[1][0][None]
    torch.testing.assert_close(again(new).logits, model(new).logits)
    fresh = ReferenceBank(8).eval()  # of another size
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(new).logits, model(new).logits)
    torch.testing.assert_close(torch.jit.script(model)(new).logits, model(new).logits)


def test_padding_changes_nothing() -> None:
    model = taught(cohort())
    new = torch.cat([bag[None] for bag, _ in cohort(seed=3, slides=2)])
    mask = torch.arange(40) < torch.tensor([40, 7])[:, None]
    together = model(new.masked_fill(~mask[..., None], float("nan")), mask)
    alone = model(new[1:, :7])
    torch.testing.assert_close(together.logits[1:], alone.logits)
    torch.testing.assert_close(together.scores[1:, :7], alone.scores)
    torch.testing.assert_close(together.attention[1:, :7], alone.attention)
    assert not together.scores[1, 7:].any()
    assert not together.attention[1, 7:].any()


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="two outputs"):
        ReferenceBank(8, 3)
    with pytest.raises(ValueError, match="n_neighbours must be at least 1"):
        ReferenceBank(8, n_neighbours=0)
    with pytest.raises(ValueError, match="two negative training slides at least, got 1"):
        taught(cohort(slides=2))
    with pytest.raises(ValueError, match="more than the references of other slides"):
        taught(cohort(slides=3, tiles=4), n_neighbours=5)
    few, _, many = cohort(slides=3)
    with pytest.raises(ValueError, match="more than the references of other slides"):
        taught([(few[0][:2], 0), many], n_neighbours=3)  # the second slide is judged by the two tiles of the first
    with pytest.raises(ValueError, match="less than a reference for each of 3 slides"):
        taught(cohort(), bank_size=2)
    with pytest.raises(ValueError, match="not a multilabel target"):
        ReferenceBank(8).learn_bags([(torch.zeros(3, 8), torch.tensor([0, 1]))])  # type: ignore[list-item]
