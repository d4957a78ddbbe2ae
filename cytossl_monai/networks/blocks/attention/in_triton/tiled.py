"""Routed attention on CUDA by kernels of our own: tiles of 8 x 8 queries with their halo, as `routed_attention` has
them, in one fused kernel that keeps neither keys of tiles nor masks nor terms of pairs in memory.

At a window of three and 32 salient patches a tile visits 229 keys, of which a query may see 82. iRPE's products of
queries (or keys) with the encodings of the buckets are plain matrix products, which the kernels look up. No GPU has
run them yet: they are off unless ``CYTOSSL_TRITON_ATTENTION=1``, and are then tried on a small image first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cytossl_monai.networks.blocks.attention.in_triton.tiled_ops import class_scores, routed_tiles
from cytossl_monai.networks.blocks.attention.in_triton.trial import constant_in_graphs, exporting, tried, triton_asked
from cytossl_monai.networks.blocks.attention.reference import salient_positions
from cytossl_monai.networks.blocks.attention.routed import TILE, routed_attention, select_salient, sequences
from cytossl_monai.networks.blocks.irpe import IRPE, RPEConfig, RPETables
from cytossl_monai.networks.blocks.token_layout import TokenLayout

__all__ = ["tiled_pays", "tiled_routed_attention"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TiledPlan:
    """Index tables of one forward pass, int32; -1 marks a place without a token.

    Attributes:
        canvas: (B, H + 2 window, W + 2 window) rows of the patches in their places; H and W divide by the tile's side.
        sequence_rows: (B, L) rows of each image's tokens, prefix first.
        place: (R,) ``grid row << 16 | grid column`` of a patch, -1 of the first prefix token, -2 of others.
    """

    canvas: Tensor
    sequence_rows: Tensor
    place: Tensor


def make_plan(layout: TokenLayout, window: int, device: torch.device) -> TiledPlan:
    """Index tables; nothing in it waits for the device."""
    batch, prefix = layout.batch, layout.num_prefix
    grid_row, grid_col = layout.rows_and_cols(device)
    if layout.counts is None:
        length = prefix + layout.num_patches
        rows = torch.arange(batch * length, device=device).view(batch, length)
        patch_rows, image = rows[:, prefix:], torch.arange(batch, device=device).unsqueeze(1)
        mask = layout.key_mask()
    else:
        # From numbers that the host has: made there and copied, which the device need not be waited for.
        rows, mask = sequences(layout, torch.device("cpu"))
        counts = torch.tensor(layout.counts)
        image = torch.repeat_interleave(torch.arange(batch), counts)
        patch_rows = torch.arange(len(image)) + (image + 1) * prefix
        rows, image, patch_rows = (table.to(device, non_blocking=True) for table in (rows, image, patch_rows))
        mask = None if mask is None else mask.to(device, non_blocking=True)
    sequence_rows = rows if mask is None else torch.where(mask, rows, -1)

    down, across = (-(-length // TILE) * TILE + 2 * window for length in layout.grid)
    at = (image * down + grid_row + window) * across + grid_col + window
    if layout.valid is not None:  # what takes no part, and may lie anywhere, goes into a cell beside the canvas
        at = torch.where(layout.valid, at, batch * down * across)
    canvas = torch.full((batch * down * across + 1,), -1, dtype=torch.int32, device=device)
    patch_rows = patch_rows.expand(at.shape).reshape(-1)
    canvas = canvas.index_copy(0, at.reshape(-1), patch_rows.int())[:-1].view(batch, down, across)

    total = rows.numel() if layout.counts is None else layout.offsets()[-1]
    place = torch.full((total,), -2, dtype=torch.int32, device=device)
    if prefix:
        place = place.index_fill(0, rows[:, 0], -1)
    own = (grid_row << 16 | grid_col).int().expand(at.shape).reshape(-1)
    place = place.index_copy(0, patch_rows, own)
    return TiledPlan(canvas, sequence_rows.int().contiguous(), place)


def tiled_routed_attention(
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
        query: (R, h, d) queries of all tokens of the batch, batched (R = B * L) or packed; not scaled; d a power of
            two, at least 16; slices of a tensor of all three are taken as they lie.
        key: (R, h, d).
        value: (R, h, d).
        layout: places of the tokens.
        irpe: relative position encoding on queries or keys, or None.
        window: w.
        num_salient: m.

    Returns:
        (R, h, d); zero for patches that take no part.
    """
    device, prefix = query.device, layout.num_prefix
    plan = layout.remember(("tiled", window), lambda: make_plan(layout, window, device))
    tables = RPETables() if irpe is None else irpe.tables()
    by_query, by_key = products(query, key, tables)
    buckets, first_bucket, other_bucket = None, 0, 0
    if irpe is not None and (by_query is not None or by_key is not None):
        buckets = layout.remember(("tiled buckets", irpe.config), lambda: irpe.bucket_of_offset.int())
        other_bucket = irpe.register_bucket
        first_bucket = irpe.class_bucket if irpe.has_class_token else irpe.register_bucket
        highest = max([first_bucket, other_bucket][: min(prefix, 2)], default=0)
        if highest >= irpe.num_buckets:  # a kernel would read beyond the products
            raise ValueError(f"{prefix} prefix tokens need a bucket that an IRPE of {irpe.num_buckets} does not have.")
    out: Tensor = routed_tiles(
        query,
        key,
        value,
        by_query,
        by_key,
        extra_rows(query, key, layout, plan, num_salient),
        plan.canvas,
        plan.sequence_rows,
        plan.place,
        buckets,
        window,
        prefix,
        first_bucket,
        other_bucket,
        layout.valid is not None,
    )[0]
    return out


def products(query: Tensor, key: Tensor, tables: RPETables) -> tuple[Tensor | None, Tensor | None]:
    """What iRPE adds at [query, bucket] and at [key, bucket]: each (h, R, buckets), or None."""
    (rows, heads), scale = query.shape[:2], query.shape[-1] ** -0.5

    def with_all(vectors: Tensor, table: Tensor) -> Tensor:
        # One product a head: vectors need not be copied together, wherever they lie.
        encodings = (table * scale).to(vectors.dtype).expand(heads, -1, -1)
        return torch.bmm(vectors.transpose(0, 1), encodings.transpose(1, 2))

    by_query = None if tables.key is None else with_all(query, tables.key)
    by_key = None if tables.query is None else with_all(key, tables.query)
    if tables.bias is not None:
        by_query = tables.bias.unsqueeze(1).expand(heads, rows, -1)
    return by_query, by_key


def extra_rows(query: Tensor, key: Tensor, layout: TokenLayout, plan: TiledPlan, num_salient: int) -> Tensor:
    """(B, P + m) int32 rows of the prefix tokens and of the salient patches, -1 where an image has fewer patches."""
    prefix = layout.num_prefix
    if not (layout.has_class_token and prefix):
        rows, mask = layout.remember("sequences", lambda: sequences(layout, query.device))
        salient, real = select_salient(query, key, layout, rows, mask, num_salient)
        return torch.cat([plan.sequence_rows[:, :prefix], torch.where(real, salient, -1).int()], dim=1)
    scores = class_scores(query.detach(), key.detach(), plan.sequence_rows, prefix)
    mean = scores.softmax(dim=-1).mean(dim=1)
    if layout.counts is not None or layout.valid is not None:
        mean = mean.masked_fill(plan.sequence_rows[:, prefix:] < 0, float("-inf"))
    salient = plan.sequence_rows.gather(1, salient_positions(mean, num_salient) + prefix)
    return torch.cat([plan.sequence_rows[:, :prefix], salient], dim=1)


def tiled_pays(query: Tensor, irpe: IRPE | None, window: int, dropout: float) -> bool:
    """Whether the kernels are asked for and can do what is asked.

    They take CUDA with Triton (``CYTOSSL_TRITON_ATTENTION=1``), 16 bits a number, heads of 16, 32, 64 or 128 numbers,
    no dropout, nothing on values and, with iRPE, no ``torch.use_deterministic_algorithms``. Two small images are
    computed by `routed_attention` too at first, forward and backward: where the kernels cannot be built or differ, a
    warning says so and they are not used.

    Args:
        query: (R, h, d).
        irpe: relative position encoding, or None.
        window: rows and columns that a query sees on each side.
        dropout: probability of dropping an attention weight.
    """
    rows, heads, width = query.shape
    if not triton_asked(query) or dropout != 0 or exporting():
        return False
    if query.dtype not in (torch.bfloat16, torch.float16) or width not in (16, 32, 64, 128):
        return False
    if irpe is None:
        return _right(query.device, query.dtype, heads, width, window)
    # Gradients of products are summed in no fixed order, and counted in 32 bits.
    if torch.are_deterministic_algorithms_enabled() or rows * irpe.num_buckets >= 2**31:
        return False
    config = irpe.config
    encoding = (config.method, config.mode, config.on, config.ratio, config.shared_heads)
    return irpe.value_table is None and _right(query.device, query.dtype, heads, width, window, *encoding)


@constant_in_graphs
def _right(*asked: Any) -> bool:
    return _tried(*asked)


@lru_cache(maxsize=64)
def _tried(device: torch.device, dtype: torch.dtype, heads: int, width: int, window: int, *encoding: Any) -> bool:
    """Whether the kernels are built here and give, for two images with holes, what the tiles give in float32."""

    def attempt() -> list[tuple[Tensor, Tensor]]:
        grid, prefix, salient = (12, 20), 2, 16
        drawn = torch.Generator().manual_seed(0)
        tokens = 2 * (prefix + grid[0] * grid[1])
        qkv = torch.randn(tokens, 3, heads, width, generator=drawn).to(device, dtype)
        # Queries of one size for the class token: rounding then cannot change which patches are salient.
        qkv[:: tokens // 2, 0] = qkv[:: tokens // 2, 0].sign()
        slope = torch.randn(tokens, heads, width, generator=drawn).to(device, dtype)
        valid = (torch.rand(2, grid[0] * grid[1], generator=drawn) > 0.2).to(device)
        irpe = IRPE(RPEConfig(*encoding), width, heads, has_registers=True) if encoding else None
        for table in () if irpe is None else irpe.parameters():
            torch.nn.init.normal_(table, std=0.3, generator=drawn)
        parameters = [] if irpe is None else list(irpe.to(device).parameters())
        results = []
        paths: tuple[Callable[..., Tensor], ...] = (tiled_routed_attention, routed_attention)
        for attention, number in zip(paths, (dtype, torch.float32)):
            given = qkv.to(number, copy=True).requires_grad_()
            out = attention(*given.unbind(1), TokenLayout(2, grid, prefix, valid=valid), irpe, window, salient)
            results.append([out, *torch.autograd.grad(out, [given, *parameters], slope.to(number))])
        return list(zip(*results, strict=True))

    return tried("routed attention in tiles", device, attempt, logger)
