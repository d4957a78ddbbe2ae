"""Routed attention as many small dense blocks: cost grows with the number of tokens, not with its square.

The grid is cut into square tiles of queries. A tile's keys are its *halo* (all patches that lie in the window of any of
its queries), the prefix tokens and the image's salient patches. Every tile is then one small dense attention with a
mask, and a batch of tiles is one batched matrix product, which keeps a processor busy where a gather per query would
only move memory. Tiles without tokens are left out, so the cost follows the cells when glass was dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cytossl_monai.networks.blocks.attention.dense import attend
from cytossl_monai.networks.blocks.attention.reference import salience, salient_positions
from cytossl_monai.networks.blocks.irpe import IRPE, RPETables
from cytossl_monai.networks.blocks.token_layout import TokenLayout

__all__ = ["attend_prefix", "routed_attention", "select_salient", "sequences", "take_rows", "tiles_pay"]

TILE = 8


@dataclass(frozen=True)
class _Tiles:
    """Index tables of one forward pass; A tiles of Q = TILE^2 queries and H = (TILE + 2 window)^2 halo keys.

    Rows are those of the tokens flattened to (R, ...); -1 marks a place without a token.
    """

    query_rows: Tensor  # (A, Q)
    halo_rows: Tensor  # (A, H)
    image: Tensor  # (A,)
    query_row: Tensor  # (A, Q) grid rows
    query_col: Tensor  # (A, Q)
    near: Tensor  # (A, Q, H) bool: the key exists and lies in the query's window
    patch_rows: Tensor  # (n,) rows of the patches
    place: Tensor  # (n,) where each patch lies among the A * Q tile queries
    sequence_rows: Tensor  # (B, L) rows of each image's sequence, padded with row 0
    sequence_mask: Tensor | None  # (B, L) bool, None when nothing is padded
    row_of_grid: Tensor  # (R,) grid row of each token, 0 for prefix tokens
    col_of_grid: Tensor  # (R,)


def tiles_pay(layout: TokenLayout, window: int, num_salient: int) -> bool:
    """Whether tiles need less arithmetic than the masked full matrix: not on small grids."""
    counts = [layout.num_patches] if layout.counts is None else layout.counts
    dense = max(counts) ** 2
    tiles = -(-layout.grid[0] // TILE) * -(-layout.grid[1] // TILE)
    return tiles * TILE**2 * ((TILE + 2 * window) ** 2 + num_salient + layout.num_prefix) < dense


def sequences(layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of each image's tokens (B, L), padded with row 0, and which of them are real."""
    if layout.counts is None:
        length = layout.num_prefix + layout.num_patches
        return torch.arange(layout.batch * length, device=device).view(layout.batch, length), layout.key_mask()
    starts = torch.tensor(layout.offsets(), device=device)
    lengths = starts[1:] - starts[:-1]
    steps = torch.arange(max(layout.counts) + layout.num_prefix, device=device)
    mask = steps < lengths.unsqueeze(1)
    return torch.where(mask, starts[:-1].unsqueeze(1) + steps, 0), mask


def _make_tiles(layout: TokenLayout, window: int, device: torch.device) -> _Tiles:
    rows, image, grid_row, grid_col = layout.patch_rows(device)
    height, width = layout.grid
    tile_rows, tile_cols = -(-height // TILE), -(-width // TILE)
    side = TILE + 2 * window
    canvas = torch.full((layout.batch, tile_rows * TILE + 2 * window, tile_cols * TILE + 2 * window), -1, device=device)
    canvas[image, grid_row + window, grid_col + window] = rows
    halo = canvas.unfold(1, side, TILE).unfold(2, side, TILE).reshape(-1, side, side)
    queries = halo[:, window : window + TILE, window : window + TILE].reshape(-1, TILE * TILE)
    halo = halo.reshape(-1, side * side)

    step = torch.arange(side, device=device)
    inner = torch.arange(TILE, device=device)
    in_window = ((inner[:, None] + window) - step[None, :]).abs() <= window  # (TILE, side)
    in_window = (in_window[:, None, :, None] & in_window[None, :, None, :]).reshape(TILE * TILE, side * side)

    tile = torch.arange(queries.shape[0], device=device)
    tile_image = torch.div(tile, tile_rows * tile_cols, rounding_mode="floor")
    top = torch.div(tile % (tile_rows * tile_cols), tile_cols, rounding_mode="floor") * TILE
    left = (tile % tile_cols) * TILE
    query_row = (top[:, None, None] + inner[:, None]).expand(-1, TILE, TILE).reshape(-1, TILE * TILE)
    query_col = (left[:, None, None] + inner[None, :]).expand(-1, TILE, TILE).reshape(-1, TILE * TILE)
    if layout.positions is not None or layout.valid is not None:
        used = (queries >= 0).any(dim=1).nonzero().squeeze(1)
        queries, halo, tile_image = queries[used], halo[used], tile_image[used]
        query_row, query_col = query_row[used], query_col[used]

    sequence_rows, sequence_mask = sequences(layout, device)
    total = int(layout.offsets()[-1]) if layout.counts is not None else sequence_rows.numel()
    flat = queries.reshape(-1)
    place_of_row = torch.zeros(total + 1, dtype=torch.long, device=device)
    place_of_row[torch.where(flat >= 0, flat, total)] = torch.arange(flat.shape[0], device=device)
    row_of_grid = torch.zeros(total, dtype=torch.long, device=device)
    col_of_grid = torch.zeros(total, dtype=torch.long, device=device)
    row_of_grid[rows] = grid_row
    col_of_grid[rows] = grid_col
    return _Tiles(
        queries,
        halo,
        tile_image,
        query_row,
        query_col,
        in_window & (halo >= 0).unsqueeze(1),
        rows,
        place_of_row[rows],
        sequence_rows,
        sequence_mask,
        row_of_grid,
        col_of_grid,
    )


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    irpe: IRPE | None,
    window: int,
    num_salient: int,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of ``sparsity="routed"`` (see `attention_mask` for its meaning), forward and backward.

    Args:
        query: (R, h, d) queries of all tokens of the batch, batched (R = B * L) or packed; not scaled.
        key: (R, h, d).
        value: (R, h, d).
        layout: places of the tokens.
        irpe: relative position encoding, or None.
        window: w, rows and columns that a query sees on each side.
        num_salient: m, patches that all patches of the image see.
        dropout: probability of dropping an attention weight.

    Returns:
        (R, h, d); zero for patches that take no part.
    """
    device, prefix = query.device, layout.num_prefix
    tiles: _Tiles = layout.remember(("tiles", window), lambda: _make_tiles(layout, window, device))
    heads, width = query.shape[1:]

    salient_rows, salient_real = select_salient(
        query, key, layout, tiles.sequence_rows, tiles.sequence_mask, num_salient
    )

    # Keys of a tile: halo, prefix tokens, salient patches. A salient patch in a query's window counts once.
    extra_rows = torch.cat([tiles.sequence_rows[:, :prefix], salient_rows], dim=1)[tiles.image]
    extra_row, extra_col = tiles.row_of_grid[extra_rows], tiles.col_of_grid[extra_rows]
    dy = tiles.query_row.unsqueeze(2) - extra_row[:, prefix:].unsqueeze(1)
    dx = tiles.query_col.unsqueeze(2) - extra_col[:, prefix:].unsqueeze(1)
    outside = (dy.abs() > window) | (dx.abs() > window)
    open_salient = outside & salient_real[tiles.image].unsqueeze(1)
    open_prefix = open_salient.new_ones(*open_salient.shape[:2], prefix)
    mask = torch.cat([tiles.near, open_prefix, open_salient], dim=2).unsqueeze(1)
    ids = None
    if irpe is not None:
        halo_ids = layout.remember(("halo ids", window, irpe.config), lambda: _halo_ids(irpe, window, device))
        count, queries = tiles.query_rows.shape
        prefix_ids = irpe.prefix_buckets(prefix, device).expand(count, queries, prefix)
        ids = torch.cat([halo_ids.expand(count, -1, -1), prefix_ids, irpe.buckets(dy, dx)], dim=2).unsqueeze(1)
    key_rows = torch.cat([tiles.halo_rows, extra_rows], dim=1)
    tables = None if irpe is None else irpe.tables()
    blocks, _ = attend(
        take_rows(query, tiles.query_rows),
        take_rows(key, key_rows),
        take_rows(value, key_rows),
        ids,
        tables,
        mask,
        dropout=dropout,
    )
    patches = blocks.transpose(1, 2).reshape(-1, heads, width).index_select(0, tiles.place)
    output = torch.zeros_like(query).index_copy(0, tiles.patch_rows, patches)
    if prefix == 0:
        return output
    return attend_prefix(
        output, query, key, value, layout, irpe, tables, tiles.sequence_rows, tiles.sequence_mask, dropout
    )


def take_rows(source: Tensor, rows: Tensor) -> Tensor:
    """Rows (A, n) of (R, h, d) as (A, h, n, d); a missing row (-1) reads row 0, which a mask must then close."""
    picked = source.index_select(0, rows.clamp_min(0).reshape(-1))
    return picked.view(*rows.shape, *source.shape[1:]).transpose(1, 2)


def select_salient(
    query: Tensor,
    key: Tensor,
    layout: TokenLayout,
    sequence_rows: Tensor,
    sequence_mask: Tensor | None,
    num_salient: int,
) -> tuple[Tensor, Tensor]:
    """The patches that all patches of their image see.

    Args:
        query: (R, h, d), not scaled.
        key: (R, h, d).
        layout: places of the tokens.
        sequence_rows: (B, L) rows of each image's tokens.
        sequence_mask: (B, L) bool of the real ones, or None.
        num_salient: m.

    Returns:
        rows (B, m), and (B, m) bool: False where an image has fewer patches than m.
    """
    asked = sequence_rows[:, :1] if layout.has_class_token else sequence_rows
    score = salience(
        take_rows(query.detach(), asked) * query.shape[-1] ** -0.5,
        take_rows(key.detach(), sequence_rows),
        layout.num_prefix,
        layout.has_class_token,
        sequence_mask,
    )
    chosen = salient_positions(score, num_salient)
    return sequence_rows.gather(1, chosen + layout.num_prefix), score.gather(1, chosen) > float("-inf")


def attend_prefix(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    irpe: IRPE | None,
    tables: RPETables | None,
    sequence_rows: Tensor,
    sequence_mask: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Prefix tokens see their whole image: ``output`` (R, h, d) with their rows filled in."""
    prefix, ids = layout.num_prefix, None
    if irpe is not None:
        own = irpe.prefix_buckets(prefix, query.device)
        others = own.unsqueeze(1).expand(prefix, sequence_rows.shape[1] - prefix)
        ids = torch.cat([torch.minimum(own.unsqueeze(0), own.unsqueeze(1)), others], dim=1)
    mask = None if sequence_mask is None else sequence_mask[:, None, None, :]
    rows = sequence_rows[:, :prefix]
    seen, _ = attend(
        take_rows(query, rows),
        take_rows(key, sequence_rows),
        take_rows(value, sequence_rows),
        ids,
        tables,
        mask,
        dropout=dropout,
    )
    return output.index_copy(0, rows.reshape(-1), seen.transpose(1, 2).reshape(-1, *query.shape[1:]))


def _halo_ids(irpe: IRPE, window: int, device: torch.device) -> Tensor:
    """Buckets of a tile's queries with its halo, the same for every tile: (Q, H)."""
    inner = torch.arange(TILE, device=device) + window
    offset = inner[:, None] - torch.arange(TILE + 2 * window, device=device)[None, :]
    dy = offset[:, None, :, None].expand(-1, TILE, -1, offset.shape[1])
    dx = offset[None, :, None, :].expand(TILE, -1, offset.shape[1], -1)
    return irpe.buckets(dy, dx).reshape(TILE * TILE, -1)
