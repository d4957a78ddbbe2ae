"""The discriminant of cells: against scikit-learn, a plain loop, and cohorts whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import expit, softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from cytossl_monai.networks.build import build_network, network_config
from cytossl_monai.networks.mil.cytology import discriminant
from cytossl_monai.networks.mil.cytology.discriminant import CellDiscriminant
from cytossl_monai.networks.mil.targets import MILLoss

Bags = list[tuple[torch.Tensor, int]]


def cohort(
    seed: int = 0,
    slides: int = 12,
    tiles: int = 60,
    classes: int = 2,
    stain: float = 0.0,
    lesions: int = 6,
    dim: int = 8,
    tints: int = 2,
) -> Bags:
    """Slides of correlated cells, classes by turns; some cells of class k > 0 lie off in a direction of their own."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(9)
    mixing, tint = torch.randn(dim, dim, generator=fixed), torch.randn(tints, dim, generator=fixed)
    bags = []
    for number in range(slides):
        features = torch.randn(tiles, dim, generator=generator)
        label = number % classes
        if label:
            features[:lesions, label - 1] += 3.0
        features = features @ mixing + stain * torch.randn(tints, generator=generator) @ tint
        bags.append((features, label))
    return bags


def taught(bags: Bags, n_outputs: int = 2, **options: object) -> CellDiscriminant:
    model = CellDiscriminant(bags[0][0].shape[1], n_outputs, **options)  # type: ignore[arg-type]
    every = torch.cat([features for features, _ in bags])
    model.set_standardisation(every.mean(dim=0), every.std(dim=0))
    model.learn_bags(bags)
    return model.eval()


def standard(model: CellDiscriminant, bags: Bags) -> list[np.ndarray]:
    mean, std = model.feature_mean.double().numpy(), model.feature_std.double().numpy()
    return [(features.double().numpy() - mean) / std for features, _ in bags]


def auc(model: CellDiscriminant, bags: Bags) -> float:
    logits = torch.cat([model(features[None]).logits for features, _ in bags])
    return float(roc_auc_score([label for _, label in bags], logits[:, 1] - logits[:, 0]))


def test_without_self_training_it_is_the_linear_discriminant_of_scikit_learn() -> None:
    bags = cohort()
    model = taught(bags, rounds=0, slide_scatter=0.0, shrinkage=1e-9)
    cells = standard(model, bags)
    labels = np.repeat([label for _, label in bags], 60)
    wanted = LinearDiscriminantAnalysis(solver="lsqr").fit(np.concatenate(cells), labels).coef_[0]
    got = model.directions[:, 0].numpy()
    assert got @ wanted / np.linalg.norm(got) / np.linalg.norm(wanted) == pytest.approx(1.0, abs=1e-4)


def test_self_training_is_that_of_a_plain_loop() -> None:
    """Slides of unlike sizes; inverse of the covariance in place of a whitening, sorting in place of topk."""
    bags = [(features[: 60 - 4 * number], label) for number, (features, label) in enumerate(cohort(stain=0.5))]
    model = taught(bags, rounds=3, positive_share=0.15, slide_scatter=7.0, shrinkage=0.2)
    cells = standard(model, bags)
    means = np.array([one.mean(0) for one in cells])
    covariance = np.mean([(one - means.mean(0)).T @ (one - means.mean(0)) / len(one) for one in cells], axis=0)
    within = means.copy()
    for first in (0, 1):
        within[first::2] -= means[first::2].mean(0)
    covariance += 7.0 * np.mean([np.outer(row, row) for row in within], axis=0) + 0.2 * np.eye(8)
    chosen = cells[1::2]
    for step in range(4):
        if step:
            chosen = [
                np.array(sorted(one, key=lambda cell: -cell @ direction)[: int(np.ceil(0.15 * len(one)))])
                for one in cells[1::2]
            ]
        direction = np.linalg.inv(covariance) @ (np.mean([one.mean(0) for one in chosen], axis=0) - means[::2].mean(0))
    places = np.concatenate(cells[::2]) @ direction
    np.testing.assert_allclose(model.directions[:, 0].numpy(), direction / places.std(), rtol=1e-3, atol=1e-4)
    new = cohort(seed=4, slides=2)[1][0]
    place = (standard(model, [(new, 1)])[0] @ direction - places.mean()) / places.std()
    slope, offset = float(model.slope.detach()), float(model.offset.detach())
    output = model(new[None])
    np.testing.assert_allclose(output.scores[0, :, 1] * 2, slope * place + offset, rtol=1e-3, atol=1e-3)
    top = np.sort(place)[-3:].mean()  # 0.05 of 60
    assert float(output.logits[0, 1] - output.logits[0, 0]) == pytest.approx(slope * top + offset, abs=1e-3)
    torch.testing.assert_close(
        output.attention[0], torch.softmax(torch.tensor(slope * place + offset).float(), 0), rtol=1e-2, atol=1e-4
    )


def test_self_training_finds_more_of_few_lesion_cells() -> None:
    """One cell of thirty: the label of a slide alone is a weak hint at a cell."""
    gains = []
    for seed in range(6):
        bags, new = cohort(seed, 16, 120, lesions=4), cohort(100 + seed, 2, 120, lesions=4)[1][0]
        truth = np.arange(120) < 4
        plain, trained = (
            roc_auc_score(truth, taught(bags, rounds=rounds)(new[None]).scores[0, :, 1]) for rounds in (0, 5)
        )
        gains.append(trained - plain)
    assert np.mean(gains) > 0.02


def test_the_scatter_between_slides_keeps_stain_out() -> None:
    with_it, without = [], []
    for seed in range(6):
        kind: dict[str, Any] = {"stain": 3.0, "lesions": 8, "dim": 24, "tints": 8}
        bags, new = cohort(seed, 24, **kind), cohort(100 + seed, 40, **kind)
        with_it.append(auc(taught(bags, slide_scatter=20.0), new))
        without.append(auc(taught(bags, slide_scatter=0.0), new))
    assert np.mean(with_it) > 0.9
    assert np.mean(with_it) > np.mean(without) + 0.1


def test_slope_and_offset_are_those_of_a_logistic_regression_on_held_out_slides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    places, positive = rng.normal(size=30), np.arange(30) < 11
    places[positive] += 1.0
    hopeful, doubtful = 12 / 13, 1 / 21  # Platt: (n + 1) / (n + 2) and 1 / (n + 2)
    target = np.where(positive, hopeful, doubtful)
    weight = np.where(positive, 0.5 / 11, 0.5 / 19)

    def regression(offset: float, penalty: float) -> tuple[float, float]:
        """Its loss by scikit-learn, minimised without gradients; the penalty is on what the slope has beyond offset."""
        return minimize(
            lambda line: (
                log_loss(
                    np.repeat([1, 0], 30),
                    np.tile(expit((line[0] + offset) * places + line[1]), 2),
                    sample_weight=np.concatenate([weight * target, weight * (1 - target)]),
                )
                + 0.5 * penalty * line[0] ** 2
            ),
            [0.0, 0.0],
            method="Nelder-Mead",
            options={"xatol": 1e-7, "fatol": 1e-12, "maxiter": 4000},
        ).x

    slope, offset = (value.item() for value in discriminant._fit_logits(places[:, None], positive.astype(int)))
    wanted = regression(1.0, 1 / (30 * 0.25))
    assert (slope, offset) == pytest.approx((1.0 + wanted[0], wanted[1]), abs=1e-3)
    monkeypatch.setattr(discriminant, "_SLOPE_SPREAD", 1e3)  # no prior to speak of: scikit-learn's own regression
    slope, offset = (value.item() for value in discriminant._fit_logits(places[:, None], positive.astype(int)))
    plain = LogisticRegression(C=1e6, tol=1e-10, max_iter=1000).fit(
        np.concatenate([places, places])[:, None],
        np.repeat([1, 0], 30),
        sample_weight=np.concatenate([weight * target, weight * (1 - target)]),
    )
    assert slope == pytest.approx(plain.coef_[0, 0], rel=1e-2)
    assert offset == pytest.approx(plain.intercept_[0], abs=1e-2)


def test_logits_of_several_classes_are_those_of_a_multinomial_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discriminant, "_SLOPE_SPREAD", 1e3)
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [20, 12, 8])
    places = rng.normal(size=(40, 2)) + np.array([[0, 0], [1.5, 0.5], [0.5, 1.5]])[labels]
    counts = np.bincount(labels)[labels][:, None]
    target = np.where(np.eye(3, dtype=bool)[labels], counts + 1, 0.5) / (counts + 2)
    slope, offset = discriminant._fit_logits(places, labels)
    plain = LogisticRegression(C=1e6, tol=1e-10, max_iter=1000).fit(
        np.tile(places, (3, 1)), np.repeat([0, 1, 2], 40), sample_weight=(target / counts / 3).T.ravel()
    )
    wanted = plain.predict_proba(places)
    logits = np.column_stack([np.zeros(40), places @ slope + offset])
    np.testing.assert_allclose(softmax(logits, axis=1), wanted, atol=2e-3)


@pytest.mark.parametrize("tiles", [1, 4, 40])
def test_what_tells_nothing_is_not_sure_of_itself(tiles: int) -> None:
    """Labels at random, few cells against many features too: new slides cost little more than a coin's log loss."""
    generator = torch.Generator().manual_seed(0)
    for slides in (4, 6, 20):
        bags = [(torch.randn(tiles, 16, generator=generator), number % 2) for number in range(slides)]
        model = taught(bags)
        new = torch.cat([model(torch.randn(1, tiles, 16, generator=generator)).logits for _ in range(200)])
        assert F.cross_entropy(new, torch.arange(200) % 2).item() < (1.5 if slides < 20 else 0.85)
        assert float(model.slope.detach().min()) > 0  # it ranks all the same


def test_no_slide_is_judged_by_what_learned_from_its_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    bags = cohort(slides=24)
    patients = [f"p{number % 12}" for number in range(24)]  # both slides of a patient have its label, far apart
    learned: list[set[str]] = []
    names = {float(bag[0, 0]): patient for (bag, _), patient in zip(bags, patients, strict=True)}
    model = CellDiscriminant(8)  # which has no standardisation yet: the features stay as they are
    learn = model._learn

    def watched(cells: list[torch.Tensor], labels: np.ndarray, shown: list[None]) -> None:
        learned.append({names[float(tiles[0, 0])] for tiles in cells})
        learn(cells, labels, shown)

    monkeypatch.setattr(model, "_learn", watched)
    model.learn_bags(bags, patients)
    assert learned.pop() == set(patients)
    assert len(learned) == 5
    held_out = [set(patients) - seen for seen in learned]
    assert sorted(name for names in held_out for name in names) == sorted(set(patients))


def test_grades_on_one_axis_are_told_apart() -> None:
    """NILM, LSIL, HSIL: the middle one lies between the others, so that a contrast with both has no direction."""
    generator = torch.Generator().manual_seed(0)

    def graded(slides: int) -> Bags:
        bags = []
        for number in range(slides):
            features = torch.randn(60, 8, generator=generator)
            features[:6, 0] += 3.0 * (number % 3)
            bags.append((features, number % 3))
        return bags

    model, new = taught(graded(36), 3), graded(60)
    predicted = torch.cat([model(features[None]).logits for features, _ in new]).argmax(dim=1).numpy()
    truth = np.array([label for _, label in new])
    assert [np.mean(predicted[truth == grade] == grade) > 0.75 for grade in range(3)] == [True] * 3


def test_several_classes_each_against_the_first() -> None:
    model, new = taught(cohort(slides=24, classes=3), 3), cohort(seed=7, slides=60, classes=3)
    predicted = torch.cat([model(features[None]).logits for features, _ in new]).argmax(dim=1).numpy()
    assert np.mean(predicted == [label for _, label in new]) > 0.85
    scores = model(new[2][0][None]).scores[0]
    assert float(scores[:6, 2].mean()) > float(scores[:6, 1].mean())  # its lesion cells are of its class


def test_training_moves_nothing() -> None:
    bags = cohort()
    model = taught(bags).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "weight_decay": 0.0}], 0.1)
    loss = MILLoss(model)(model(torch.stack([x for x, _ in bags])), torch.tensor([label for _, label in bags]))
    loss.backward()
    optimizer.step()
    assert float(loss.detach()) > 0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_file_keeps_it_and_padding_changes_nothing() -> None:
    model = taught(cohort())
    again = build_network(network_config(model)).eval()
    again.load_state_dict(model.state_dict())
    new = torch.cat([bag[None] for bag, _ in cohort(seed=3, slides=2)])
    torch.testing.assert_close(again(new).logits, model(new).logits)
    torch.testing.assert_close(torch.jit.script(model)(new).logits, model(new).logits)
    mask = torch.arange(60) < torch.tensor([60, 7])[:, None]
    together = model(new.masked_fill(~mask[..., None], float("nan")), mask)
    alone = model(new[1:, :7])
    torch.testing.assert_close(together.logits[1:], alone.logits)
    torch.testing.assert_close(together.attention[1:, :7], alone.attention)
    assert not together.scores[1, 7:].any()
    assert not together.attention[1, 7:].any()


def test_cells_of_large_cohorts_are_drawn_alike_from_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discriminant, "_MOST_CELLS", 400)
    model = CellDiscriminant(8)
    bags = cohort(slides=10)
    bags[0] = (torch.cat([bags[0][0]] * 50), 0)
    cells, labels = model._draw(bags)
    assert [len(tiles) for tiles in cells] == [40] * 10
    assert labels.tolist() == [label for _, label in bags]
    wide, whole = taught(bags), cohort(seed=8, slides=40)
    assert auc(wide, whole) > 0.8


def test_a_single_slide_of_a_class_is_learned_from() -> None:
    bags = cohort(slides=7)
    model = taught([bags[0], bags[1], bags[2]])
    assert auc(model, cohort(seed=8, slides=40)) > 0.6


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="target multiclass"):
        CellDiscriminant(8, 1)
    with pytest.raises(ValueError, match="must lie in"):
        CellDiscriminant(8, positive_share=0.0)
    with pytest.raises(ValueError, match="shrinkage above 0"):
        CellDiscriminant(8, shrinkage=0.0)
    with pytest.raises(ValueError, match=r"of each of 2 classes at least.*got \[6, 0\]"):
        taught(cohort()[::2])
    with pytest.raises(ValueError, match=r"got \[4, 4, 4\]"):
        taught(cohort(classes=3))
    with pytest.raises(ValueError, match="not a multilabel target"):
        CellDiscriminant(8).learn_bags([(torch.zeros(3, 8), torch.tensor([0, 1]))])  # type: ignore[list-item]
