"""Do probabilities mean what they say: expected calibration error and temperature scaling."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cytossl_monai.networks.mil.targets import target_loss

__all__ = ["brier_score", "expected_calibration_error", "fit_temperature"]


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
