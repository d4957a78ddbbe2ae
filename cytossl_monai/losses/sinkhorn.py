"""Sinkhorn-Knopp: soft assignments in which every prototype gets an equal share of the batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cytossl_monai.losses.gather import all_reduce_sum
from cytossl_monai.losses.precision import full_precision, widen
from cytossl_monai.utils.distributed import is_distributed

__all__ = ["sinkhorn_knopp"]


@torch.no_grad()
@full_precision
def sinkhorn_knopp(logits: Tensor, temperature: float | Tensor, iterations: int = 3) -> Tensor:
    """Assign samples to prototypes so that no prototype is left out: centring and sharpening in one.

    ``exp(logits / temperature)`` is scaled in turn by prototype (each gets ``B / K`` of the whole batch) and by sample
    (each gives 1). The batch is that of all processes, which may hold different numbers of samples, also none.

    Papers: Cuturi, NeurIPS 2013; Caron et al. (SwAV), NeurIPS 2020; used so in DINOv2 (Oquab et al., TMLR 2024).

    Args:
        logits: (B, K) float.
        temperature: > 0; lower is sharper.
        iterations: rounds of scaling, at least 1. Three are published.

    Returns:
        (B, K) float32 (float64 for float64), rows sum to 1.

    Raises:
        ValueError: when ``logits`` is not (B, K) or ``iterations`` below 1.
    """
    if logits.ndim != 2 or iterations < 1:
        raise ValueError(f"need logits (B, K) and iterations >= 1, got {tuple(logits.shape)} and {iterations}")
    scores = widen(logits) / temperature
    # A constant common to the whole batch cancels in the first scaling, and keeps the exponential from overflowing.
    largest = scores.max() if scores.numel() else scores.new_full((), float("-inf"))
    if is_distributed():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    shares = torch.exp(scores - largest)
    tiny = torch.finfo(shares.dtype).tiny
    for _ in range(iterations):
        # Factors common to all entries (the K and the B of the formula) cancel in the scaling by sample.
        shares = shares / all_reduce_sum(shares.sum(0, keepdim=True)).clamp_min(tiny)
        shares = shares / shares.sum(1, keepdim=True).clamp_min(tiny)
    return shares
