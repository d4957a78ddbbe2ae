"""Routed attention on CUDA through FlexAttention: one fused kernel that visits only blocks of keys that may be open.

All patches of a batch lie in one sequence, image after image, in raster order; after them, image by image, lie copies
of the prefix tokens and of the salient patches, so that what every patch sees fills a block of its own and opens no
other. A block of queries visits the blocks of keys whose image, rows and columns it can reach. Of iRPE nothing is
materialised for pairs: products of queries (or keys) with the encodings of the buckets, (h, N, buckets), are looked up
inside the kernel.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from cytossl_monai.networks.blocks.attention.in_triton.trial import has_triton, tried
from cytossl_monai.networks.blocks.attention.routed import attend_prefix, select_salient, sequences, take_rows
from cytossl_monai.networks.blocks.irpe import IRPE, RPEConfig, RPETables
from cytossl_monai.networks.blocks.token_layout import TokenLayout

__all__ = ["flex_pays", "flex_routed_attention"]

BLOCK = 128
# What a key is: a patch in its place, a copy of a prefix token, a copy of a salient patch, or nothing.
_PATCH, _PREFIX, _SALIENT, _CLOSED = range(4)
_EVERYWHERE = 2**20  # a row that no grid has
# Smaller than PyTorch's own: with iRPE's lookups inside, those need 276 KiB of an H100's 227 KiB of shared memory.
_BLOCKS: Any = {
    "num_stages": 2,
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 64,
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlexPlan:
    """Index tables of one forward pass: n patches as queries; K = n + B (P + m) keys.

    Attributes:
        patch_rows: (n,) rows of the patches among the tokens.
        image: (K,) image of each key; the first n are the queries' too.
        row: (n,) grid row of each patch.
        col: (n,) grid column.
        sequence_rows: (B, L) rows of each image's tokens.
        sequence_mask: (B, L) bool, or None.
        blocks: which blocks of keys a block of queries visits; its ``mask_mod`` is set by layer.
    """

    patch_rows: Tensor
    image: Tensor
    row: Tensor
    col: Tensor
    sequence_rows: Tensor
    sequence_mask: Tensor | None
    blocks: BlockMask


def flex_pays(query: Tensor, irpe: IRPE | None, dropout: float) -> bool:
    """Whether FlexAttention can do what is asked, on this machine.

    It takes CUDA with Triton, 16 bits a number (of 32 its blocks outgrow an H100's shared memory), no dropout and
    nothing on values. Where its kernels cannot be built, a warning says so, and the tiles do it; within
    ``torch.compile`` that is not tried.

    The environment variable ``CYTOSSL_FLEX_ATTENTION=0`` switches it off.
    """
    if not query.is_cuda or os.environ.get("CYTOSSL_FLEX_ATTENTION", "1") == "0":
        return False
    width = query.shape[-1]
    fits = query.dtype in (torch.bfloat16, torch.float16) and width >= 16 and width & (width - 1) == 0
    on_values = irpe is not None and irpe.value_table is not None
    if dropout != 0 or on_values or not fits or not has_triton(query.device.index):
        return False
    if torch.compiler.is_compiling():
        return True
    config = None if irpe is None else irpe.config
    return _can_be_built(query.device, query.dtype, query.shape[-2], width, config)


@lru_cache(maxsize=64)
def _can_be_built(device: torch.device, dtype: torch.dtype, heads: int, width: int, config: RPEConfig | None) -> bool:
    """Build the kernels, forward and backward, for a small image; whether a GPU and a PyTorch take them is not known
    before, and a training is not to end over it."""

    def attempt() -> list[tuple[Tensor, Tensor]]:
        irpe = None if config is None else IRPE(config, width, heads).to(device)
        tokens = torch.ones(1 + 32 * 32, heads, width, device=device, dtype=dtype, requires_grad=True)
        out = flex_routed_attention(tokens, tokens, tokens, TokenLayout(1, (32, 32), 1), irpe, 3, 16)
        out.float().sum().backward()
        return []

    return tried("FlexAttention", device, attempt, logger)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def make_plan(layout: TokenLayout, window: int, num_salient: int, device: torch.device) -> FlexPlan:
    """Index tables, and the blocks that may hold an open pair: those whose images, rows and columns meet."""
    patch_rows, image, row, col = layout.patch_rows(device)
    sequence_rows, sequence_mask = sequences(layout, device)
    # Images with fewer patches than m still get as many copies as the longest; the rest of them are closed.
    copies = layout.num_prefix + min(num_salient, sequence_rows.shape[1] - layout.num_prefix)
    extra_image = torch.arange(layout.batch, device=device).repeat_interleave(copies)
    key_image = torch.cat([image, extra_image])
    nowhere, everywhere = torch.zeros_like(extra_image), torch.full_like(extra_image, _EVERYWHERE)
    open_blocks = _meet(image, image, key_image, key_image, 0)
    for place in (row, col):
        low, high = torch.cat([place, nowhere]), torch.cat([place, everywhere])
        open_blocks &= _meet(place, place, low, high, window)
    number = open_blocks.sum(dim=-1, dtype=torch.int32)
    order = open_blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    blocks = BlockMask.from_kv_blocks(
        number[None, None], order[None, None], BLOCK_SIZE=BLOCK, seq_lengths=(len(image), len(key_image))
    )
    return FlexPlan(patch_rows, key_image, row, col, sequence_rows, sequence_mask, blocks)


def _meet(query_low: Tensor, query_high: Tensor, key_low: Tensor, key_high: Tensor, reach: int) -> Tensor:
    """(query blocks, key blocks) bool: the ranges of the two blocks, widened by ``reach``, overlap."""

    def by_block(values: Tensor) -> Tensor:
        missing = -len(values) % BLOCK
        return torch.cat([values, values[-1:].expand(missing)]).view(-1, BLOCK)

    q_low, q_high = by_block(query_low).amin(1).unsqueeze(1) - reach, by_block(query_high).amax(1).unsqueeze(1) + reach
    return (q_low <= by_block(key_high).amax(1)) & (by_block(key_low).amin(1) <= q_high)


def make_mods(
    query: Tensor,
    key: Tensor,
    plan: FlexPlan,
    layout: TokenLayout,
    irpe: IRPE | None,
    tables: RPETables,
    window: int,
    salient_rows: Tensor,
    salient_real: Tensor,
) -> tuple[Tensor, Callable[..., Tensor], Callable[..., Tensor] | None]:
    """Keys of the fused kernel, and what it computes of a pair.

    Args:
        query: (R, h, d), not scaled.
        key: (R, h, d).
        plan: of `make_plan`.
        layout: places of the tokens.
        irpe: relative position encoding, or None.
        tables: its encodings.
        window: w.
        salient_rows: (B, m) of `select_salient`.
        salient_real: (B, m) bool.

    Returns:
        rows (K,) of the keys, ``mask_mod`` and ``score_mod`` (None without encoding).
    """
    device, prefix, batch = query.device, layout.num_prefix, layout.batch
    row_of = torch.zeros(query.shape[0], dtype=torch.int32, device=device).index_copy(
        0, plan.patch_rows, plan.row.int()
    )
    col_of = torch.zeros_like(row_of).index_copy(0, plan.patch_rows, plan.col.int())
    extra = torch.cat([plan.sequence_rows[:, :prefix], salient_rows], dim=1)
    key_rows = torch.cat([plan.patch_rows, extra.reshape(-1)])
    of_prefix = torch.full((batch, prefix), _PREFIX, device=device)
    of_salient = torch.where(salient_real, _SALIENT, _CLOSED)
    kind = F.pad(torch.cat([of_prefix, of_salient], dim=1).reshape(-1), (len(plan.patch_rows), 0), value=_PATCH).int()
    image, row, col = plan.image.int(), row_of[key_rows], col_of[key_rows]  # a query's are those of its own key

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = ((row[q] - row[k]).abs() <= window) & ((col[q] - col[k]).abs() <= window)
        kind_k = kind[k]
        seen = ((kind_k == _PATCH) & near) | (kind_k == _PREFIX) | ((kind_k == _SALIENT) & ~near)
        return (image[q] == image[k]) & seen

    if irpe is None or (tables.bias is None and tables.key is None and tables.query is None):
        return key_rows, mask_mod, None

    own = irpe.prefix_buckets(prefix, device).expand(batch, prefix)
    prefix_bucket = F.pad(own, (0, salient_rows.shape[1]), value=-1).reshape(-1)
    prefix_bucket = F.pad(prefix_bucket, (len(plan.patch_rows), 0), value=-1).int()
    reach, shared = irpe.reach, irpe.config.shared_heads
    side, bucket_of_offset = 2 * reach + 1, irpe.bucket_of_offset.flatten().int()
    scale = query.shape[-1] ** -0.5
    # In float32: their gradients are gathered from many pairs at once by atomic sums, which bfloat16 may not have.
    bias = None if tables.bias is None else tables.bias.float()
    by_query, by_key = None, None
    if tables.key is not None:
        scaled = (query * scale).index_select(0, plan.patch_rows).transpose(0, 1)
        by_query = (scaled @ tables.key.to(query.dtype).transpose(-2, -1)).float().contiguous()  # (h, n, buckets)
    if tables.query is not None:
        scaled = (key * scale).index_select(0, key_rows).transpose(0, 1)
        by_key = (scaled @ tables.query.to(key.dtype).transpose(-2, -1)).float().contiguous()  # (h, K, buckets)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        dy = (row[q] - row[k]).clamp(-reach, reach) + reach
        dx = (col[q] - col[k]).clamp(-reach, reach) + reach
        of_prefix = prefix_bucket[k]
        bucket = torch.where(of_prefix >= 0, of_prefix, bucket_of_offset[dy * side + dx])
        if bias is not None:
            score = score + bias[h * 0 if shared else h, bucket]
        if by_query is not None:
            score = score + by_query[h, q, bucket]
        if by_key is not None:
            score = score + by_key[h, k, bucket]
        return score

    return key_rows, mask_mod, score_mod


def flex_routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    irpe: IRPE | None,
    window: int,
    num_salient: int,
) -> Tensor:
    """As `routed_attention`, without dropout and without an encoding on the values.

    Args:
        query: (R, h, d) queries of all tokens of the batch, batched (R = B * L) or packed; not scaled.
        key: (R, h, d).
        value: (R, h, d).
        layout: places of the tokens.
        irpe: relative position encoding on queries or keys, or None.
        window: w.
        num_salient: m.

    Returns:
        (R, h, d); zero for patches that take no part.
    """
    device = query.device
    plan = layout.remember(("flex", window, num_salient), lambda: make_plan(layout, window, num_salient, device))
    tables = RPETables() if irpe is None else irpe.tables()
    salient = select_salient(query, key, layout, plan.sequence_rows, plan.sequence_mask, num_salient)
    key_rows, mask_mod, score_mod = make_mods(query, key, plan, layout, irpe, tables, window, *salient)
    blocks = copy.copy(plan.blocks)
    blocks.mask_mod = mask_mod
    kernel: Any = flex_attention if torch.compiler.is_compiling() or not query.is_cuda else _compiled()
    patches = kernel(
        take_rows(query, plan.patch_rows[None]),
        take_rows(key, key_rows[None]),
        take_rows(value, key_rows[None]),
        score_mod=score_mod,
        block_mask=blocks,
        kernel_options=_BLOCKS if query.is_cuda else None,
    )
    output = torch.zeros_like(query).index_copy(0, plan.patch_rows, patches[0].transpose(0, 1))
    if layout.num_prefix == 0:
        return output
    return attend_prefix(output, query, key, value, layout, irpe, tables, plan.sequence_rows, plan.sequence_mask)
