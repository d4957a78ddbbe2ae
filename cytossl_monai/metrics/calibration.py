"""Do probabilities mean what they say: calibration errors, prevalence, temperature and prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cytossl_monai.networks.mil.targets import class_probabilities, target_loss

__all__ = [
    "brier_score",
    "class_shares",
    "classwise_calibration_error",
    "expected_calibration_error",
    "fit_calibration",
    "fit_temperature",
    "reliability_bins",
    "training_prior",
]


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, n_bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over bins of confidence, weighted by their size (Guo et al., 2017).

    Args:
        labels: (n,) classes, or (n, C) findings: then every finding is a decision of its own.
        probabilities: (n, C).
        n_bins: bins of equal width over [0, 1].

    Returns:
        in [0, 1]; NaN without slides.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if len(labels) == 0:
        return float("nan")
    if labels.ndim == 2:
        said = probabilities >= 0.5
        confidence = np.where(said, probabilities, 1 - probabilities).ravel()
        right = (said == (labels == 1)).ravel()
    else:
        confidence = probabilities.max(axis=1)
        right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * np.mean(bins == b) for b in np.unique(bins)]
    return float(np.sum(gaps))


def brier_score(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean squared distance between probabilities (n, C) and the truth, summed over classes; 0 is perfect."""
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    truth = labels if labels.ndim == 2 else np.eye(probabilities.shape[1])[labels]
    return float(np.mean(np.sum((probabilities - truth) ** 2, axis=1)))


def fit_temperature(
    logits: Tensor,
    labels: Tensor,
    target: str = "multiclass",
    bounds: tuple[float, float] = (0.25, 20.0),
    prior: float = 1.0,
) -> float:
    """The temperature that makes ``logits / T`` likeliest on slides not trained on (Guo et al., ICML 2017).

    The likelihood is convex in 1/T, so a golden-section search finds its only minimum. Where a classifier is right
    on all slides the likeliest T runs to zero; the bounds keep it from claiming certainty.

    Args:
        logits: (n, K) of held-out slides.
        labels: (n,) classes or (n, C) findings.
        target: "multiclass", "ordinal" or "multilabel".
        bounds: smallest and largest temperature.
        prior: how strongly T is held near 1, in slides: ``prior * log(T)^2`` is added to the summed likelihood. On a
            handful of slides it keeps chance from deciding, on hundreds it does not count. 0: plain maximum likelihood.

    Returns:
        T > 0; 1.0 without slides. It never changes which class is highest (multiclass).
    """
    if len(logits) == 0:
        return 1.0
    logits = logits.detach().double()
    low, high = 1.0 / bounds[1], 1.0 / bounds[0]
    ratio = (5**0.5 - 1) / 2

    def cost(inverse: float) -> float:
        held = prior * float(np.log(inverse)) ** 2 / len(logits)
        return float(target_loss(logits * inverse, labels, target)) + held

    for _ in range(60):
        width = ratio * (high - low)
        if cost(high - width) < cost(low + width):
            high = low + width
        else:
            low = high - width
    return float(np.clip(2.0 / (low + high), *bounds))


def reliability_bins(present: np.ndarray, probabilities: np.ndarray, n_bins: int = 10) -> np.ndarray:
    """Points of a reliability diagram of one class.

    Args:
        present: (n,) 0 and 1, whether the slide is of the class.
        probabilities: (n,) of the class.
        n_bins: bins of equal width over [0, 1].

    Returns:
        (m, 3) for each bin that holds slides: mean probability, share of the class, number of slides.
    """
    present, probabilities = np.asarray(present, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    bins = np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
    rows = [
        (probabilities[bins == b].mean(), present[bins == b].mean(), float(np.sum(bins == b))) for b in np.unique(bins)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def classwise_calibration_error(labels: np.ndarray, probabilities: np.ndarray, n_bins: int = 10) -> float:
    """Mean over the classes of the gap between a class' probability and its share, over bins weighted by their size.

    Kull et al., *Beyond temperature scaling*, NeurIPS 2019. The error of the top label alone can be near zero while a
    rare class is overstated throughout.

    Args:
        labels: (n,) classes, or (n, C) findings.
        probabilities: (n, C).
        n_bins: bins of equal width over [0, 1].

    Returns:
        in [0, 1]; NaN without slides.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if len(labels) == 0:
        return float("nan")
    truth = labels if labels.ndim == 2 else np.eye(probabilities.shape[1])[labels]
    errors = []
    for c in range(probabilities.shape[1]):
        points = reliability_bins(truth[:, c], probabilities[:, c], n_bins)
        errors.append(float(np.sum(np.abs(points[:, 0] - points[:, 1]) * points[:, 2]) / len(labels)))
    return float(np.mean(errors))


def class_shares(labels: Any, target: str, n_classes: int) -> Tensor:
    """(C,) share of each class, or of the slides with each finding, of (n,) or (n, C) labels.

    A class without a slide counts half a slide (``multilabel``: a finding of none or all slides, too), as no prior may
    be 0.
    """
    labels = np.asarray(labels)
    if target == "multilabel":
        return torch.from_numpy((labels.sum(axis=0).clip(0.5, len(labels) - 0.5)) / len(labels))
    counts = np.maximum(np.bincount(labels, minlength=n_classes), 0.5)
    return torch.from_numpy(counts / counts.sum())


def training_prior(
    items: Sequence[dict[str, Any]], target: str, balanced: bool = True, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """What shares of the classes a training's loss sees, and those of its cohort.

    Args:
        items: training items, with ``label`` and ``classes``.
        target: the kind of target.
        balanced: whether every class (``multilabel``: every combination of findings) is drawn equally often.
        class_weights: of the loss, see ``MILLoss``.

    Returns:
        ``seen`` and ``cohort``, each (C,).
    """
    labels = np.array([item["label"] for item in items])
    n_classes = len(items[0]["classes"])
    cohort = class_shares(labels, target, n_classes)
    seen = cohort
    if balanced:
        seen = class_shares(np.unique(labels, axis=0), target, n_classes)
    if class_weights is not None:
        weights = class_weights.detach().cpu().double()
        if target == "multilabel":
            odds = weights * seen / (1.0 - seen)
            seen = odds / (1.0 + odds)
        else:
            seen = weights * seen / (weights * seen).sum()
    return {"seen": seen, "cohort": cohort}


def fit_calibration(
    logits: Tensor,
    labels: Tensor,
    target: str = "multiclass",
    shift: Tensor | None = None,
    bounds: tuple[float, float] = (0.25, 20.0),
    prior: float = 1.0,
) -> tuple[float, Tensor]:
    """Temperature and bias that make probabilities likeliest on slides not trained on.

    The bias is drawn to the known change of the prior: classes are drawn in balance in training, so that the logits
    stand for a cohort of equal shares, which no temperature can take back. On few slides it stays there, on many the
    slides decide.

    Args:
        logits: (n, K) of held-out slides.
        labels: (n,) classes or (n, C) findings.
        target: "multiclass", "ordinal" or "multilabel".
        shift: (C,) of ``prior_shift``, from the prior of training to the cohort's; None: zeros.
        bounds: smallest and largest temperature.
        prior: how strongly log T is held near 0 and the bias near the shift, in slides; see ``fit_temperature``.

    Returns:
        T > 0 and the bias (C,) float64, to be used by ``class_probabilities(logits / T, target, bias)``.
    """
    count = logits.shape[1] + int(target == "ordinal")
    start = torch.zeros(count, dtype=torch.float64) if shift is None else shift.detach().double()
    if len(logits) == 0:
        return 1.0, start
    logits, labels = logits.detach().double(), labels.detach()
    inverse, bias = torch.zeros((), dtype=torch.float64), start.clone()
    inverse.requires_grad_(), bias.requires_grad_()
    solver = torch.optim.LBFGS([inverse, bias], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def cost() -> Tensor:
        solver.zero_grad()
        found = class_probabilities(logits * inverse.exp(), target, bias).clamp(1e-12, 1.0 - 1e-12)
        if target == "multilabel":
            wanted = labels.double()
            loss = -(wanted * found.log() + (1.0 - wanted) * (-found).log1p()).mean()
        else:
            loss = -found[torch.arange(len(labels)), labels.long()].log().mean()
        held = prior * (inverse**2 + ((bias - start) ** 2).sum()) / len(logits)
        total: Tensor = loss + held
        total.backward()
        return total

    solver.step(cost)
    temperature = float(np.clip(float((-inverse.detach()).exp()), *bounds))
    return temperature, bias.detach()
