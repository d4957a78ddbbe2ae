"""Weighted k nearest neighbours: how well frozen features separate known classes, without training anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["balanced_accuracy", "knn_cross_validate", "knn_predict"]


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    n_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """Votes of the k most similar features, each with weight ``exp(cosine / temperature)``.

    Wu et al., *Unsupervised Feature Learning via Non-Parametric Instance Discrimination*, CVPR 2018.

    Args:
        bank: (N, D) features with known labels; need not be normalised.
        bank_labels: (N,) integers in [0, n_classes).
        queries: (M, D) features.
        n_classes: number of classes.
        k: neighbours, at most N are used.
        temperature: the smaller, the more the nearest count.
        chunk: queries at a time, which bounds memory.

    Returns:
        (M, n_classes) float32 shares of the vote, summing to 1.

    Raises:
        ValueError: when the bank is empty or shapes do not fit.
    """
    if len(bank) == 0 or len(bank) != len(bank_labels) or bank.shape[1:] != queries.shape[1:]:
        raise ValueError(f"bank {tuple(bank.shape)}, labels {tuple(bank_labels.shape)}, queries {tuple(queries.shape)}")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and temperature above zero, got {k} and {temperature}")
    bank = F.normalize(bank.float(), dim=1)
    one_hot = F.one_hot(bank_labels.long(), n_classes).float()
    votes = []
    for part in F.normalize(queries.float(), dim=1).split(chunk):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        weights = torch.softmax(similarity / temperature, dim=1)  # normalising the weights changes no vote
        votes.append((weights.unsqueeze(2) * one_hot[nearest]).sum(1))
    return torch.cat(votes) if votes else torch.empty(0, n_classes)


def balanced_accuracy(predicted: Tensor, labels: Tensor, n_classes: int) -> float:
    """Mean over the classes that occur of the share that is recognised (scikit-learn's ``balanced_accuracy_score``)."""
    hits = torch.bincount(labels[predicted == labels], minlength=n_classes).double()
    counts = torch.bincount(labels, minlength=n_classes).double()
    present = counts > 0
    return float((hits[present] / counts[present]).mean())


def knn_cross_validate(
    features: Tensor,
    labels: Tensor,
    folds: Sequence[int] | Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Classify every fold by the others.

    Args:
        features: (N, D).
        labels: (N,) integers from 0.
        folds: (N,) fold of each sample; what belongs together (a patient) is in one fold.
        k: see ``knn_predict``.
        temperature: see ``knn_predict``.

    Returns:
        ``balanced_accuracy`` over all samples, their ``accuracy``, and ``fold_std``, the standard deviation of the
        folds' balanced accuracies.

    Raises:
        ValueError: when there are fewer than two folds.
    """
    folds = torch.as_tensor(folds)
    values = torch.unique(folds)
    if len(values) < 2:
        raise ValueError("cross-validation needs at least two folds")
    n_classes = int(labels.max()) + 1
    predicted = torch.empty_like(labels)
    scores = []
    for value in values:
        held = folds == value
        votes = knn_predict(features[~held], labels[~held], features[held], n_classes, k, temperature)
        predicted[held] = votes.argmax(1).to(labels.device)
        scores.append(balanced_accuracy(predicted[held], labels[held], n_classes))
    return {
        "balanced_accuracy": balanced_accuracy(predicted, labels, n_classes),
        "accuracy": float((predicted == labels).double().mean()),
        "fold_std": float(torch.tensor(scores).std()),
    }
