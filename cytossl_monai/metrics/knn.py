"""Weighted k nearest neighbours: how well frozen features separate known classes, without training anything."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["knn_predict"]


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    n_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
    class_weighted: bool = False,
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
        class_weighted: divide a neighbour's vote by the number of its class in the bank. Where one class is three
            quarters of the bank most neighbours are of it whatever the features say; votes that are not weighted then
            hardly move the balanced accuracy.

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
    if class_weighted:
        one_hot = one_hot / one_hot.sum(0).clamp_min(1.0)
    votes = []
    for part in F.normalize(queries.float(), dim=1).split(chunk):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        weights = torch.softmax(similarity / temperature, dim=1)  # normalising the weights changes no vote
        vote = (weights.unsqueeze(2) * one_hot[nearest]).sum(1)
        votes.append(vote / vote.sum(1, keepdim=True))
    return torch.cat(votes) if votes else torch.empty(0, n_classes)
