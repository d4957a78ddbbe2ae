"""What sparse relative attention means, written to be read: every faster path is tested against this file."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cytossl_monai.networks.blocks.irpe import IRPE, RPETables
from cytossl_monai.networks.blocks.token_layout import TokenLayout

__all__ = ["attention_mask", "num_kept", "open_share", "reach", "reference_attention", "salience", "salient_positions"]


def num_kept(keep_ratio: float, tokens: int, num_keys: int | None = None) -> int:
    """Keys that a query keeps under ``topk``.

    Args:
        keep_ratio: share of the tokens, where ``num_keys`` is None.
        tokens: how many there are to choose from: those of the image that take part.
        num_keys: an absolute number, as published; all where there are fewer tokens.

    Returns:
        ``num_keys``, or ``ceil(keep_ratio * tokens)``; at least one and, for ``num_keys``, at most ``tokens``.
    """
    if num_keys is not None:
        return max(1, min(num_keys, tokens))
    return max(1, math.ceil(keep_ratio * tokens - 1e-9))


def reach(grid: tuple[int, int], num_salient: int | None, window: int | None) -> tuple[int, int]:
    """Salient patches and window of routed attention on a grid.

    Args:
        grid: rows and columns of patches.
        num_salient: as set; None: grows with the grid, 32 of the 196 patches of a 14 x 14 grid, and at least one.
        window: as set; None: grows with the shorter side, 3 patches of 14, and at least one.

    Returns:
        Both as numbers. Where both grow, about a third of the pairs is open on every grid.
    """
    if num_salient is None:
        num_salient = max(1, round(32 / 196 * grid[0] * grid[1]))
    return num_salient, max(1, round(3 / 14 * min(grid))) if window is None else window


def open_share(grid: tuple[int, int], num_salient: int, window: int) -> float:
    """Share of the pairs of patches that routed attention leaves open, where any patch is as likely a salient one.

    On a small grid a window of three and 32 salient patches see nearly all: figures of such a network are those of
    dense attention, at a higher price.

    Args:
        grid: rows and columns of patches.
        num_salient: patches that every patch sees.
        window: rows and columns that a patch sees on each side.
    """
    near = 1.0
    for length in grid:
        seen = sum(min(place + window, length - 1) - max(place - window, 0) + 1 for place in range(length))
        near *= seen / length**2
    return near + (1.0 - near) * min(1.0, num_salient / (grid[0] * grid[1]))


def salience(query: Tensor, key: Tensor, num_prefix: int, has_class_token: bool, key_mask: Tensor | None) -> Tensor:
    """How much an image as a whole looks at each patch: the class token's attention, averaged over heads.

    The plain content score is used (no iRPE: its class bucket gives all patches alike). Without a class token the mean
    query of the patches takes its place. Selecting by it has no parameters of its own: what the class token looks at
    is trained by the loss, through the class token's own output. The selection itself passes no gradient.

    Args:
        query: (B, h, P + N, d) queries, scaled.
        key: (B, h, P + N, d).
        num_prefix: P.
        has_class_token: whether token 0 is the class token.
        key_mask: (B, P + N) bool or None.

    Returns:
        (B, N) float32; ``-inf`` for patches that take no part. No gradient.
    """
    with torch.no_grad():
        patches = key[:, :, num_prefix:].float()
        if has_class_token:
            ask = query[:, :, 0].float()
        elif key_mask is None:
            ask = query[:, :, num_prefix:].float().mean(dim=2)
        else:
            weight = key_mask[:, None, num_prefix:, None].float()
            ask = (query[:, :, num_prefix:].float() * weight).sum(dim=2) / weight.sum(dim=2).clamp_min(1)
        score = (patches * ask.unsqueeze(2)).sum(dim=-1)
        if key_mask is not None:
            score = score.masked_fill(~key_mask[:, None, num_prefix:], float("-inf"))
        mean = score.softmax(dim=-1).mean(dim=1)
        if key_mask is not None:
            mean = mean.masked_fill(~key_mask[:, num_prefix:], float("-inf"))
        return mean


def salient_positions(score: Tensor, num_salient: int) -> Tensor:
    """Indices of the ``num_salient`` (at most N) most salient patches of each image; equal ones by lower index.

    Args:
        score: (B, N) of `salience`.
        num_salient: number to select.

    Returns:
        (B, min(num_salient, N)) int64.
    """
    number = min(num_salient, score.shape[-1])
    if torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort; its TopK gives equal values by lower index.
        return score.topk(number, dim=-1).indices
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    return order[:, :number]


def attention_mask(
    scores: Tensor,
    query: Tensor,
    key: Tensor,
    layout: TokenLayout,
    sparsity: str,
    keep_ratio: float = 1.0,
    num_salient: int = 0,
    window: int = 0,
    num_keys: int | None = None,
    sparse_prefix: bool = False,
) -> Tensor:
    """Which keys each query keeps.

    - ``none``: all that take part.
    - ``topk``: a patch keeps its ``num_keys``, or ``ceil(keep_ratio * N)``, best patches (N: those that take part; keys
      whose score equals the last kept one's are kept too) and all prefix tokens.
    - ``routed``: a patch keeps patches at most ``window`` rows and columns away, the image's ``num_salient`` most
      salient patches, and all prefix tokens.

    Prefix tokens (class token, registers) keep every token that takes part, in each mode; but under ``topk`` with
    ``sparse_prefix`` they are tokens as all others, as published: every row keeps its best keys among all tokens, and
    the class token is kept where it is among them.

    Args:
        scores: (B, h, L, L), with iRPE.
        query: (B, h, L, d), scaled.
        key: (B, h, L, d).
        layout: batched form.
        sparsity: ``none``, ``topk`` or ``routed``.
        keep_ratio: for ``topk``.
        num_salient: for ``routed``.
        window: for ``routed``.
        num_keys: for ``topk``: an absolute number in place of ``keep_ratio``.
        sparse_prefix: for ``topk``: prefix tokens choose and are chosen as patches are.

    Returns:
        bool, broadcastable to (B, h, L, L).
    """
    prefix, batch, length = layout.num_prefix, scores.shape[0], scores.shape[-1]
    key_mask = layout.key_mask()
    takes_part = torch.ones(batch, length, dtype=torch.bool, device=scores.device) if key_mask is None else key_mask
    kept = takes_part[:, None, None, :].expand(batch, 1, length, length)
    if sparsity == "none":
        return kept
    patch = torch.arange(length, device=scores.device) >= prefix
    both_patches = patch[:, None] & patch[None, :]
    if sparsity == "topk":
        if sparse_prefix:
            patch = torch.ones_like(patch)
            both_patches = patch[:, None] & patch[None, :]
        patch_scores = scores.detach().masked_fill(~(takes_part & patch)[:, None, None, :], float("-inf"))
        order = patch_scores.sort(dim=-1, descending=True).values
        count = (takes_part & patch).sum(dim=-1)
        number = torch.tensor([num_kept(keep_ratio, int(n), num_keys) for n in count], device=scores.device)
        last = order.gather(-1, (number - 1).view(batch, 1, 1, 1).expand(*scores.shape[:3], 1))
        return kept & (~both_patches | (patch_scores >= last))
    rows, cols = layout.rows_and_cols(scores.device)
    rows, cols = rows.expand(batch, length - prefix), cols.expand(batch, length - prefix)
    near = ((rows.unsqueeze(2) - rows.unsqueeze(1)).abs() <= window) & (
        (cols.unsqueeze(2) - cols.unsqueeze(1)).abs() <= window
    )
    chosen = torch.zeros(batch, length - prefix, dtype=torch.bool, device=scores.device)
    score = salience(query, key, prefix, layout.has_class_token, key_mask)
    salient = salient_positions(score, num_salient)
    # A tensor as the source: TorchScript has no scatter of a bool number.
    chosen = chosen.scatter(1, salient, torch.ones_like(salient, dtype=torch.bool))
    allowed = torch.ones(batch, length, length, dtype=torch.bool, device=scores.device)
    allowed[:, prefix:, prefix:] = near | chosen.unsqueeze(1)
    return kept & allowed.unsqueeze(1)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    irpe: IRPE | None = None,
    sparsity: str = "none",
    keep_ratio: float = 1.0,
    num_salient: int = 0,
    window: int = 0,
    num_keys: int | None = None,
    sparse_prefix: bool = False,
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention over all pairs, with the encoding of every pair spelled out: slow and plain.

    Args:
        query: (B, h, L, d), not scaled; L = P + N.
        key: (B, h, L, d).
        value: (B, h, L, d).
        layout: batched form.
        irpe: relative position encoding, or None.
        sparsity: see `attention_mask`.
        keep_ratio: see `attention_mask`.
        num_salient: see `attention_mask`.
        window: see `attention_mask`.
        num_keys: see `attention_mask`.
        sparse_prefix: see `attention_mask`.

    Returns:
        output (B, h, L, d) and attention (B, h, L, L). Rows of tokens that take no part mean nothing.
    """
    scaled = query * query.shape[-1] ** -0.5
    scores = scaled @ key.transpose(-2, -1)
    tables, ids = RPETables(), None
    if irpe is not None:
        tables = irpe.tables()
        ids = irpe.pair_buckets(*layout.rows_and_cols(query.device), layout.num_prefix)
        ids = ids if ids.dim() == 3 else ids.unsqueeze(0)  # (1 or B, L, L)
    if tables.bias is not None:
        scores = scores + tables.bias[:, ids].transpose(0, 1)
    if tables.key is not None:  # q_i . r_ij
        scores = scores + torch.einsum("bhid,hbijd->bhij", scaled, _pairs(tables.key, ids, scaled))
    if tables.query is not None:  # k_j . r_ij
        scaled_key = key * query.shape[-1] ** -0.5
        scores = scores + torch.einsum("bhjd,hbijd->bhij", scaled_key, _pairs(tables.query, ids, scaled))
    settings = (sparsity, keep_ratio, num_salient, window, num_keys, sparse_prefix)
    mask = attention_mask(scores, scaled, key, layout, *settings)
    attention = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    output = attention @ value
    if tables.value is not None:  # sum_j a_ij r_ij
        output = output + torch.einsum("bhij,hbijd->bhid", attention, _pairs(tables.value, ids, scaled))
    return output, attention


def _pairs(table: Tensor, ids: Tensor | None, like: Tensor) -> Tensor:
    """The encoding of each pair: (h, B, L, L, d)."""
    vectors = table[:, ids]
    return vectors.expand(like.shape[1], like.shape[0], *vectors.shape[2:])
