"""Attention of blocks of queries over blocks of keys with iRPE: the core of every path but the reference."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cytossl_monai.networks.blocks.irpe import RPETables

__all__ = ["attend", "rpe_scores"]


def rpe_scores(query: Tensor, key: Tensor, ids: Tensor, tables: RPETables, scale: float) -> Tensor | None:
    """The terms that iRPE adds to the scores. Products are taken per bucket and looked up: never a vector a pair.

    Args:
        query: (..., h, Q, d), scaled.
        key: (..., h, K, d), not scaled.
        ids: int64 buckets, broadcastable to (..., h, Q, K).
        tables: the layer's encodings.
        scale: factor of the score.

    Returns:
        broadcastable to (..., h, Q, K), or None without an encoding on queries or keys.
    """
    total: Tensor | None = None
    shape = query.shape[:-1] + key.shape[-2:-1]
    if tables.bias is not None:
        heads = torch.arange(tables.bias.shape[0], device=ids.device).view(-1, 1, 1)
        total = tables.bias.to(query.dtype)[heads, ids]
    if tables.key is not None:
        looked_up = (query @ tables.key.to(query.dtype).transpose(-2, -1)).gather(-1, ids.expand(shape))
        total = looked_up if total is None else total + looked_up
    if tables.query is not None:
        products = (key * scale) @ tables.query.to(query.dtype).transpose(-2, -1)
        looked_up = products.gather(-1, ids.expand(shape).transpose(-2, -1)).transpose(-2, -1)
        total = looked_up if total is None else total + looked_up
    return total


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ids: Tensor | None = None,
    tables: RPETables | None = None,
    mask: Tensor | None = None,
    keep: tuple[int, Tensor | None] | None = None,
    num_prefix: int = 0,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention with iRPE terms, a mask and, if asked, only the best keys of each query.

    Args:
        query: (..., h, Q, d), not scaled.
        key: (..., h, K, d).
        value: (..., h, K, d).
        ids: buckets of the pairs, broadcastable to (..., h, Q, K); needed with ``tables``.
        tables: encodings, or None.
        mask: bool, broadcastable to (..., h, Q, K); True where a key may be attended. None: everywhere.
        keep: for ``topk``: the number of keys that a query keeps, as an int and as an optional tensor broadcastable to
            (..., h, Q, 1) where it differs by image.
        num_prefix: with ``keep``: so many first queries and keys are exempt; 0 where the rule binds all tokens.
        dropout: probability of dropping an attention weight (0 outside training).
        need_weights: return the attention as well.

    Returns:
        output (..., h, Q, d) and attention (..., h, Q, K) or None.
    """
    scale = query.shape[-1] ** -0.5
    tables = tables or RPETables()
    if keep is None and tables.value is None and not need_weights:
        terms = None if ids is None else rpe_scores(query * scale, key, ids, tables, scale)
        if terms is not None and mask is not None:
            terms = terms.masked_fill(~mask, float("-inf"))
        if terms is not None and mask is None and _products_pay(query):
            return _by_products(query, key, value, terms, scale, dropout), None
        bias = mask if terms is None else terms
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout), None

    query = query * scale
    scores = query @ key.transpose(-2, -1)
    terms = None if ids is None else rpe_scores(query, key, ids, tables, scale)
    if terms is not None:
        scores = scores + terms
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if keep is not None:
        scores = _keep_best(scores, keep, num_prefix)
    weights = scores.softmax(dim=-1)
    dropped = F.dropout(weights, dropout) if dropout > 0 else weights
    output = dropped @ value
    if tables.value is not None and ids is not None:
        buckets = dropped.new_zeros(*dropped.shape[:-1], tables.value.shape[1])
        buckets = buckets.scatter_add(-1, ids.expand(dropped.shape), dropped)
        output = output + buckets @ tables.value.to(dropped.dtype)
    return output, weights if need_weights else None


def _products_pay(query: Tensor) -> bool:
    """Whether plain batched products beat PyTorch's attention with learned terms: on a CPU, outside exported graphs.

    There PyTorch has no kernel that gives the terms a gradient. It adds them in a pass of its own and looks for rows
    without an open key, of which there are none where nothing is masked.
    """
    exporting = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
    return query.device.type == "cpu" and not exporting


def _by_products(query: Tensor, key: Tensor, value: Tensor, terms: Tensor, scale: float, dropout: float) -> Tensor:
    """Softmax attention of unmasked pairs: the terms are added inside the product of queries and keys."""
    shape = query.shape[:-1] + key.shape[-2:-1]
    rows = [part.reshape(-1, *part.shape[-2:]) for part in (query, key, value)]
    terms = terms.expand(shape).reshape(-1, *shape[-2:])
    scores = torch.baddbmm(terms, rows[0], rows[1].transpose(-2, -1), alpha=scale)
    weights = scores.softmax(dim=-1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return (weights.to(value.dtype) @ rows[2]).view(*shape[:-1], value.shape[-1])


def _keep_best(scores: Tensor, keep: tuple[int, Tensor | None], num_prefix: int) -> Tensor:
    """Close all but the best patch keys of every patch query; keys equal to the last kept one stay open.

    A closed score is lowered by the type's largest number, a term without gradient: its weight, and with it its
    gradient, is zero anyway, and so the backward pass need not look at the mask.
    """
    number, by_image = keep
    with torch.no_grad():
        patches = scores[..., num_prefix:, num_prefix:]
        if by_image is None:
            last = _kth_largest(patches, number)
        else:
            order = patches.sort(dim=-1, descending=True).values
            last = order.gather(-1, (by_image - 1).expand(*order.shape[:-1], 1))
        closed = (patches < last).to(scores.dtype) * torch.finfo(scores.dtype).min
        closed = F.pad(closed, (num_prefix, 0, num_prefix, 0))
    return scores + closed


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of the last axis, (..., 1): what `torch.topk` gives last.

    On a CPU numpy's partition does it, which uses vector instructions where `torch.topk` does not and is five times
    as fast; a graph that is compiled, traced or exported keeps to torch.
    """
    plain = values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)
    if plain and not torch.compiler.is_compiling() and not torch.jit.is_tracing() and type(values) is Tensor:
        place = values.shape[-1] - k
        return torch.from_numpy(np.partition(values.numpy(), place, axis=-1)[..., place : place + 1])
    return values.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
