# mypy: disallow-untyped-defs=False
"""Triton kernels of routed attention, forward; what they share with the backward ones.

A program takes one head of one tile of 8 x 8 queries and walks over the tile's *slots*: first its halo (every patch in
the window of any of its queries), then the prefix tokens and salient patches of its image. Slots without a token hold
the row -1. What is open, and which bucket a pair falls in, follows from where the two tokens lie: no mask is in memory.

``place`` tells where a token lies: ``row << 16 | column`` of a patch, -1 of the first prefix token, -2 of others.
Arguments that end in ``_ptr`` are tensors, those in capitals are built into the kernel; scores and log-sum-exps are in
powers of two. What shapes the tensors have is told in `cytossl_monai.networks.blocks.attention.in_triton.tiled_ops`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cytossl_monai.networks.blocks.attention import routed

TILE = tl.constexpr(routed.TILE)
LOG2_E = tl.constexpr(1.4426950408889634)
# A finite start of the running maximum: a chunk without an open key must not give inf - inf.
LOWEST = tl.constexpr(-1.0e30)
# "Bucket" of a pair of patches where a prefix token's is asked for: above every bucket.
NO_BUCKET = tl.constexpr(1 << 30)
# For numbers that are 1 or divide by 16 Triton would build a kernel anew; packed batches have many lengths.
NUMBERS = [
    *("by_query_row", "by_query_head", "by_key_row", "by_key_head", "rows", "heads", "extras", "length", "prefix"),
    *("tile_rows", "tile_cols", "reach", "first_bucket", "other_bucket", "buckets", "parts"),
]


@triton.jit
def times(left, right):
    """Product of matrices; of float32 ones, which only tests have, without rounding to TF32."""
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def canvas_rows(canvas_ptr, tile, tile_rows, tile_cols, step, WINDOW: tl.constexpr, HALO: tl.constexpr):
    """Rows of a tile's own 64 patches (``HALO`` 0), or of its halo (``HALO`` the window), by their number ``step``."""
    across = tile_cols * TILE + 2 * WINDOW
    down = tile_rows * TILE + 2 * WINDOW
    image, place = tile // (tile_rows * tile_cols), tile % (tile_rows * tile_cols)
    side: tl.constexpr = TILE + 2 * HALO
    y = (place // tile_cols) * TILE + WINDOW - HALO + step // side
    x = (place % tile_cols) * TILE + WINDOW - HALO + step % side
    return tl.load(canvas_ptr + (image * down + y) * across + x, mask=step < side * side, other=-1)


@triton.jit
def listed_rows(list_ptr, item, first, number):
    """Entries ``first`` and on of a list of ``number`` rows; -1 before its start and after its end."""
    at = item - first
    return tl.load(list_ptr + at, mask=(at >= 0) & (at < number), other=-1)


@triton.jit
def places(place_ptr, row):
    """Places of tokens; those of missing ones mean nothing."""
    return tl.load(place_ptr + row, mask=row >= 0, other=0)


@triton.jit
def vectors(ptr, row, head, stride_row, stride_head, WIDTH: tl.constexpr):
    """One head of the tokens in some rows, (rows, WIDTH); zeros for missing ones, whose memory is not touched."""
    at = row.to(tl.int64)[:, None] * stride_row + head * stride_head + tl.arange(0, WIDTH)[None, :]
    return tl.load(ptr + at, mask=(row >= 0)[:, None], other=0.0)


@triton.jit
def is_near(q_place, k_place, WINDOW: tl.constexpr):
    """Whether two patches lie in each other's window."""
    dy = (q_place >> 16) - (k_place >> 16)
    dx = (q_place & 0xFFFF) - (k_place & 0xFFFF)
    # As unsigned numbers what is below -WINDOW is large: one comparison in place of two.
    return ((dy + WINDOW).to(tl.uint32) <= 2 * WINDOW) & ((dx + WINDOW).to(tl.uint32) <= 2 * WINDOW)


@triton.jit
def prefix_bucket(place, first_bucket, other_bucket):
    """Bucket of all pairs of a prefix token (of two tokens the lower counts); `NO_BUCKET` for a patch."""
    return tl.where(place >= 0, NO_BUCKET, tl.where(place == -1, first_bucket, other_bucket))


@triton.jit
def pair_buckets(q_place, k_place, of_prefix, bucket_ptr, reach):
    """Buckets of pairs: ``of_prefix`` where it is one, else that of the clamped offset, which the table always has."""
    dy = (q_place >> 16) - (k_place >> 16)
    dx = (q_place & 0xFFFF) - (k_place & 0xFFFF)
    y = tl.minimum(tl.maximum(dy, -reach), reach) + reach
    x = tl.minimum(tl.maximum(dx, -reach), reach) + reach
    return tl.where(of_prefix == NO_BUCKET, tl.load(bucket_ptr + (y * (2 * reach + 1) + x)), of_prefix)


@triton.jit
def scores(
    product, q_row, q_place, k_row, k_place, of_prefix, seen, head, scale, bucket_ptr, reach,
    by_query_ptr, by_key_ptr, by_query_row, by_query_head, by_key_row, by_key_head,
    BY_QUERY: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """Scores of pairs with iRPE's terms, looked up at [query, bucket] and [key, bucket] for open pairs alone.

    ``product`` is that of queries and keys, either way round; rows and places broadcast to it. Also returns buckets.
    A head's part of the products is addressed in 32 bits: it has fewer than 2^31 numbers.
    """
    score = product * (scale * LOG2_E)
    bucket = tl.full(product.shape, 0, tl.int32)
    if BY_QUERY or BY_KEY:
        bucket = pair_buckets(q_place, k_place, of_prefix, bucket_ptr, reach)
    if BY_QUERY:
        own = by_query_ptr + head.to(tl.int64) * by_query_head
        score += tl.load(own + (q_row * by_query_row + bucket), mask=seen, other=0.0).to(tl.float32) * LOG2_E
    if BY_KEY:
        own = by_key_ptr + head.to(tl.int64) * by_key_head
        score += tl.load(own + (k_row * by_key_row + bucket), mask=seen, other=0.0).to(tl.float32) * LOG2_E
    return score, bucket


@triton.jit
def slot_rows(canvas_ptr, extra_ptr, tile, tile_rows, tile_cols, extras, slot, WINDOW: tl.constexpr):
    """Rows of a tile's slots: its halo, then the tokens that its whole image sees."""
    halo: tl.constexpr = (TILE + 2 * WINDOW) * (TILE + 2 * WINDOW)
    in_halo = canvas_rows(canvas_ptr, tile, tile_rows, tile_cols, slot, WINDOW, WINDOW)
    image = tile // (tile_rows * tile_cols)
    return tl.maximum(in_halo, listed_rows(extra_ptr + image * extras, slot, halo, extras))


@triton.jit
def seen_from_tile(q_row, q_place, k_row, k_place, slot, WINDOW: tl.constexpr):
    """Open pairs of a tile's queries with a chunk of its slots, (queries, slots).

    A salient patch in the window stands in the halo already, and counts once.
    """
    halo: tl.constexpr = (TILE + 2 * WINDOW) * (TILE + 2 * WINDOW)
    near = is_near(q_place[:, None], k_place[None, :], WINDOW)
    seen = (near != (slot >= halo)[None, :]) | (k_place < 0)[None, :]
    return seen & (q_row >= 0)[:, None] & (k_row >= 0)[None, :]


@triton.jit
def soften(score, seen, value, highest, total, mixed):
    """One chunk of the running softmax: new maximum, sums of weights, and sum of weighted values, of each query.

    Weights are summed by place in the chunk, and over places once, in the end: threads need not meet for it here.
    """
    score = tl.where(seen, score, float("-inf"))
    new = tl.maximum(highest, tl.max(score, 1))
    weight = tl.exp2(score - new[:, None])
    fade = tl.exp2(highest - new)
    total = total * fade[:, None] + weight
    mixed = mixed * fade[:, None] + times(weight.to(value.dtype), value)
    return new, total, mixed


@triton.jit
def finish(out_ptr, lse_ptr, row, head, rows, heads, highest, total, mixed, WIDTH: tl.constexpr):
    """Write outputs into their tokens' rows of (rows, heads, WIDTH), log-sum-exps into (heads, rows)."""
    total = tl.where(row >= 0, tl.sum(total, 1), 1.0)  # where there is no query, nothing was summed
    at = (row.to(tl.int64)[:, None] * heads + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out_ptr + at, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=(row >= 0)[:, None])
    tl.store(lse_ptr + head * rows + row, highest + tl.log2(total), mask=row >= 0)


@triton.jit(do_not_specialize=NUMBERS)
def forward_patches(
    q_ptr, k_ptr, v_ptr, by_query_ptr, by_key_ptr, canvas_ptr, extra_ptr, place_ptr, bucket_ptr, out_ptr, lse_ptr,
    stride_row, stride_head, by_query_row, by_query_head, by_key_row, by_key_head,
    rows, heads, extras, tile_rows, tile_cols, reach, first_bucket, other_bucket, scale,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, BY_QUERY: tl.constexpr, BY_KEY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Attention of one tile's patches in one head: program = tile * heads + head."""
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    q_row = canvas_rows(canvas_ptr, tile, tile_rows, tile_cols, tl.arange(0, TILE * TILE), WINDOW, 0)
    if tl.max(q_row) < 0:
        return
    q_place = places(place_ptr, q_row)
    query = vectors(q_ptr, q_row, head, stride_row, stride_head, WIDTH)
    halo: tl.constexpr = (TILE + 2 * WINDOW) * (TILE + 2 * WINDOW)

    highest = tl.full((TILE * TILE,), LOWEST, tl.float32)
    total = tl.full((TILE * TILE, CHUNK), 0.0, tl.float32)
    mixed = tl.full((TILE * TILE, WIDTH), 0.0, tl.float32)
    for start in range(0, extras + halo, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        k_row = slot_rows(canvas_ptr, extra_ptr, tile, tile_rows, tile_cols, extras, slot, WINDOW)
        k_place = places(place_ptr, k_row)
        key = vectors(k_ptr, k_row, head, stride_row, stride_head, WIDTH)
        value = vectors(v_ptr, k_row, head, stride_row, stride_head, WIDTH)
        seen = seen_from_tile(q_row, q_place, k_row, k_place, slot, WINDOW)
        score, _ = scores(
            times(query, tl.trans(key)), q_row[:, None], q_place[:, None], k_row[None, :], k_place[None, :],
            prefix_bucket(k_place, first_bucket, other_bucket)[None, :],
            seen, head, scale, bucket_ptr, reach,
            by_query_ptr, by_key_ptr, by_query_row, by_query_head, by_key_row, by_key_head, BY_QUERY, BY_KEY,
        )  # fmt: skip
        highest, total, mixed = soften(score, seen, value, highest, total, mixed)
    finish(out_ptr, lse_ptr, q_row, head, rows, heads, highest, total, mixed, WIDTH)


@triton.jit(do_not_specialize=NUMBERS)
def forward_prefix(
    q_ptr, k_ptr, v_ptr, by_query_ptr, by_key_ptr, sequence_ptr, place_ptr, bucket_ptr, out_ptr, lse_ptr,
    stride_row, stride_head, by_query_row, by_query_head, by_key_row, by_key_head,
    rows, heads, length, prefix, reach, first_bucket, other_bucket, scale,
    WIDTH: tl.constexpr, PREFIX: tl.constexpr, BY_QUERY: tl.constexpr, BY_KEY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Attention of one image's prefix tokens over the whole image, in one head: program = image * heads + head."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence_ptr += image * length
    q_row = listed_rows(sequence_ptr, tl.arange(0, PREFIX), 0, prefix)
    q_place = places(place_ptr, q_row)
    query = vectors(q_ptr, q_row, head, stride_row, stride_head, WIDTH)
    q_bucket = prefix_bucket(q_place, first_bucket, other_bucket)

    highest = tl.full((PREFIX,), LOWEST, tl.float32)
    total = tl.full((PREFIX, CHUNK), 0.0, tl.float32)
    mixed = tl.full((PREFIX, WIDTH), 0.0, tl.float32)
    for start in range(0, length, CHUNK):
        k_row = listed_rows(sequence_ptr, start + tl.arange(0, CHUNK), 0, length)
        k_place = places(place_ptr, k_row)
        key = vectors(k_ptr, k_row, head, stride_row, stride_head, WIDTH)
        value = vectors(v_ptr, k_row, head, stride_row, stride_head, WIDTH)
        seen = (q_row >= 0)[:, None] & (k_row >= 0)[None, :]
        score, _ = scores(
            times(query, tl.trans(key)), q_row[:, None], q_place[:, None], k_row[None, :], k_place[None, :],
            tl.minimum(q_bucket[:, None], prefix_bucket(k_place, first_bucket, other_bucket)[None, :]),
            seen, head, scale, bucket_ptr, reach,
            by_query_ptr, by_key_ptr, by_query_row, by_query_head, by_key_row, by_key_head, BY_QUERY, BY_KEY,
        )  # fmt: skip
        highest, total, mixed = soften(score, seen, value, highest, total, mixed)
    finish(out_ptr, lse_ptr, q_row, head, rows, heads, highest, total, mixed, WIDTH)


@triton.jit(do_not_specialize=NUMBERS)
def class_scores(
    q_ptr, k_ptr, sequence_ptr, score_ptr, stride_row, stride_head, heads, length, prefix, scale,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Content scores of an image's patches with its class token, into (images, heads, patches): `salience` in float32.

    Program (image * heads + head, chunk). Patches that take no part get -inf.
    """
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence_ptr += image * length
    number = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    k_row = listed_rows(sequence_ptr + prefix, number, 0, length - prefix)
    key = vectors(k_ptr, k_row, head, stride_row, stride_head, WIDTH).to(tl.float32)
    at = tl.load(sequence_ptr).to(tl.int64) * stride_row + head * stride_head + tl.arange(0, WIDTH)
    # Scaled and rounded as the plain definition does it, so that both choose the same patches.
    query = (tl.load(q_ptr + at).to(tl.float32) * scale).to(q_ptr.dtype.element_ty).to(tl.float32)
    score = tl.where(k_row >= 0, tl.sum(key * query[None, :], 1), float("-inf"))
    at = tl.program_id(0).to(tl.int64) * (length - prefix) + number
    tl.store(score_ptr + at, score, mask=number < length - prefix)
