# mypy: disallow-untyped-defs=False
"""The Triton kernels of `fused`: blocks of pairs of one image and head, whose scores never leave the processor.

Imported only where they are used, since Triton is not installed everywhere. In all of them ``rows`` are queries and
``cols`` keys; L tokens an image, H heads, D numbers a head, B buckets of iRPE. ``qkv`` is (image, token, 3, head, D);
products by bucket are (image, token, head, B) of queries and values, (image, head, B, token) of keys: so what
neighbouring pairs look up lies close together. ``scores`` and all sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_rows", "backward_cols", "backward_rows"]

# The order of float numbers as the order of integers: -inf, and below every number.
_ORDER_OF_MINUS_INF = tl.constexpr(-2139095041)
_LOWEST = tl.constexpr(-2147483648)
# Numbers that differ from batch to batch: no kernel of its own is to be built for each.
_OF_BATCHES = ["length", "ids_of_image", "number", "prefix"]


@triton.jit
def _order(scores):
    """Integers that are ordered as the float32 numbers are, and back again."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _middle(low, high):
    """Rounded up, and without the overflow of a sum."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _bar(scores, candidates, number):
    """What a score must reach to be one of the ``number`` best of its row.

    The bar lies half-way to the next lower score: the backward pass computes scores in other blocks, and their last
    digit may differ. Found by bisection, whose 32 steps cost less than sorting.
    """
    order = tl.where(candidates, _order(scores), _LOWEST)
    high = tl.max(order, 1)
    low = tl.full(high.shape, _LOWEST, tl.int32)
    for _ in range(32):
        middle = _middle(low, high)
        enough = tl.sum((order >= middle[:, None]).to(tl.int32), 1) >= number
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    below = tl.max(tl.where(order < low[:, None], order, _LOWEST), 1)
    bar = _middle(tl.maximum(low, _ORDER_OF_MINUS_INF), tl.maximum(below, _ORDER_OF_MINUS_INF))
    return tl.where(bar < 0, bar ^ 0x7FFFFFFF, bar).to(tl.float32, bitcast=True)


@triton.jit
def _part(length, heads, size):
    """What this program is for: image, head, and block of tokens of that size."""
    blocks = tl.cdiv(length, size)
    image_and_head = tl.program_id(0) // blocks
    return (image_and_head // heads).to(tl.int64), image_and_head % heads, tl.program_id(0) % blocks


@triton.jit
def _tokens(base, tokens, stride, width, length):
    """(tokens, width) of one head."""
    return tl.load(base + tokens[:, None] * stride + width[None, :], mask=tokens[:, None] < length, other=0.0)


@triton.jit
def _pairs(
    query, key, rows, cols, ids, by_query, by_key, open_keys, stride_by, scale, length,
    ON_QUERIES: tl.constexpr, ON_KEYS: tl.constexpr, ON_VALUES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores of pairs, -inf where a key is closed; whether it is open; and buckets."""
    is_open = (rows[:, None] < length) & (cols[None, :] < length)
    if MASKED:
        is_open = is_open & (tl.load(open_keys + cols, mask=cols < length, other=0) != 0)[None, :]
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    bucket = tl.zeros(scores.shape, tl.int32)
    if ON_QUERIES or ON_KEYS or ON_VALUES:
        bucket = tl.load(ids + rows[:, None] * length + cols[None, :], mask=is_open, other=0).to(tl.int32)
    if ON_QUERIES:
        scores += tl.load(by_query + rows[:, None] * stride_by + bucket, mask=is_open, other=0.0).to(tl.float32)
    if ON_KEYS:
        scores += tl.load(by_key + bucket * length + cols[None, :], mask=is_open, other=0.0).to(tl.float32)
    return tl.where(is_open, scores, float("-inf")), is_open, bucket


@triton.jit(do_not_specialize=_OF_BATCHES)
def attend_rows(
    qkv, ids, by_query, by_key, open_keys, numbers, out, shares, log_sums, bars,
    length, heads, buckets, ids_of_image, number, prefix, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ON_QUERIES: tl.constexpr, ON_KEYS: tl.constexpr,
    ON_VALUES: tl.constexpr, MASKED: tl.constexpr, BEST: tl.constexpr, BY_IMAGE: tl.constexpr,
):  # fmt: skip
    """Forward, M queries over all keys at once (N >= L): a row must be whole before its best keys are known.

    Grid (images * heads * L / M). ``shares`` (image, token, head, B) float32 must be zero: where iRPE lies on
    values, it gets what each query gives to each bucket.
    """
    image, head, block = _part(length, heads, M)
    rows, cols, width = block * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    stride, stride_by = 3 * heads * D, heads * buckets
    first, first_by = image * length * stride + head * D, (image * length * heads + head) * buckets
    by_key += (image * heads + head) * buckets * length
    query = _tokens(qkv + first, rows, stride, width, length)
    key = _tokens(qkv + first + heads * D, cols, stride, width, length)
    scores, is_open, bucket = _pairs(
        query, key, rows, cols, ids + image * ids_of_image, by_query + first_by, by_key,
        open_keys + image * length, stride_by, scale, length, ON_QUERIES, ON_KEYS, ON_VALUES, MASKED,
    )  # fmt: skip
    row_places = (image * heads + head) * length + rows
    if BEST:
        if BY_IMAGE:
            number = tl.load(numbers + image)
        bar = _bar(scores, is_open & (cols >= prefix)[None, :], number)
        is_open = is_open & ((scores >= bar[:, None]) | (rows < prefix)[:, None] | (cols < prefix)[None, :])
        scores = tl.where(is_open, scores, float("-inf"))
        tl.store(bars + row_places, bar, mask=rows < length)
    highest = tl.maximum(tl.max(scores, 1), -1e30)  # a row may have no open key
    weights = tl.exp(scores - highest[:, None])
    total = tl.maximum(tl.sum(weights, 1), 1e-30)
    weights = weights / total[:, None]
    tl.store(log_sums + row_places, highest + tl.log(total), mask=rows < length)
    if ON_VALUES:
        places = shares + first_by + rows[:, None] * stride_by + bucket
        tl.atomic_add(places, weights, mask=is_open, sem="relaxed")
    value = _tokens(qkv + first + 2 * heads * D, cols, stride, width, length)
    result = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    places = out + (image * length * heads + head) * D + rows[:, None] * heads * D + width[None, :]
    tl.store(places, result.to(out.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def _weights_and_slopes(
    query, key, value, slope, rows, cols, ids, by_query, by_key, by_value, open_keys, log_sums, deltas, bars, stride_by,
    prefix, scale, length, ON_QUERIES: tl.constexpr, ON_KEYS: tl.constexpr, ON_VALUES: tl.constexpr,
    MASKED: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Attention of pairs, computed again, and the loss's slope by their scores."""
    scores, is_open, bucket = _pairs(
        query, key, rows, cols, ids, by_query, by_key, open_keys, stride_by, scale, length,
        ON_QUERIES, ON_KEYS, ON_VALUES, MASKED,
    )  # fmt: skip
    if BEST:
        bar = tl.load(bars + rows, mask=rows < length, other=0.0)
        is_open = is_open & ((scores >= bar[:, None]) | (rows < prefix)[:, None] | (cols < prefix)[None, :])
    log_sum = tl.load(log_sums + rows, mask=rows < length, other=0.0)
    delta = tl.load(deltas + rows, mask=rows < length, other=0.0)
    weights = tl.where(is_open, tl.exp(scores - log_sum[:, None]), 0.0)
    by_weights = tl.dot(slope, tl.trans(value), input_precision="ieee")
    if ON_VALUES:
        by_weights += tl.load(by_value + rows[:, None] * stride_by + bucket, mask=is_open, other=0.0).to(tl.float32)
    return weights, weights * (by_weights - delta[:, None]), is_open, bucket


@triton.jit(do_not_specialize=_OF_BATCHES)
def backward_rows(
    qkv, ids, by_query, by_key, by_value, open_keys, slopes, log_sums, deltas, bars, d_qkv, d_by_query,
    length, heads, buckets, ids_of_image, prefix, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ON_QUERIES: tl.constexpr, ON_KEYS: tl.constexpr,
    ON_VALUES: tl.constexpr, MASKED: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Slopes by M queries and by what iRPE says of them (``d_by_query``, float32, must be zero); N keys at a time.

    Grid (images * heads * L / M). ``by_value`` are the slopes by ``shares``, ``deltas`` (image, head, token) the
    products of each result with its slope.
    """
    image, head, block = _part(length, heads, M)
    rows, width = block * M + tl.arange(0, M), tl.arange(0, D)
    stride, stride_by = 3 * heads * D, heads * buckets
    first, first_by = image * length * stride + head * D, (image * length * heads + head) * buckets
    by_key += (image * heads + head) * buckets * length
    first_row = (image * heads + head) * length
    query = _tokens(qkv + first, rows, stride, width, length)
    slope = _tokens(slopes + (image * length * heads + head) * D, rows, heads * D, width, length)
    total = tl.zeros([M, D], tl.float32)
    for start in range(0, length, N):
        cols = start + tl.arange(0, N)
        key = _tokens(qkv + first + heads * D, cols, stride, width, length)
        value = _tokens(qkv + first + 2 * heads * D, cols, stride, width, length)
        _, by_scores, is_open, bucket = _weights_and_slopes(
            query, key, value, slope, rows, cols, ids + image * ids_of_image, by_query + first_by, by_key,
            by_value + first_by, open_keys + image * length, log_sums + first_row, deltas + first_row, bars + first_row,
            stride_by, prefix, scale, length, ON_QUERIES, ON_KEYS, ON_VALUES, MASKED, BEST,
        )  # fmt: skip
        total += tl.dot(by_scores.to(key.dtype), key, input_precision="ieee")
        if ON_QUERIES:
            places = d_by_query + first_by + rows[:, None] * stride_by + bucket
            tl.atomic_add(places, by_scores, mask=is_open, sem="relaxed")
    places = d_qkv + first + rows[:, None] * stride + width[None, :]
    tl.store(places, (total * scale).to(d_qkv.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit(do_not_specialize=_OF_BATCHES)
def backward_cols(
    qkv, ids, by_query, by_key, by_value, open_keys, slopes, log_sums, deltas, bars, d_qkv, d_by_key,
    length, heads, buckets, ids_of_image, prefix, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ON_QUERIES: tl.constexpr, ON_KEYS: tl.constexpr,
    ON_VALUES: tl.constexpr, MASKED: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Slopes by N keys and values, and by what iRPE says of the keys (``d_by_key``, float32, zero); M queries a time.

    Grid (images * heads * L / N).
    """
    image, head, block = _part(length, heads, N)
    cols, width = block * N + tl.arange(0, N), tl.arange(0, D)
    stride, stride_by = 3 * heads * D, heads * buckets
    first, first_by = image * length * stride + head * D, (image * length * heads + head) * buckets
    by_key += (image * heads + head) * buckets * length
    first_row = (image * heads + head) * length
    key = _tokens(qkv + first + heads * D, cols, stride, width, length)
    value = _tokens(qkv + first + 2 * heads * D, cols, stride, width, length)
    d_key, d_value = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    for start in range(0, length, M):
        rows = start + tl.arange(0, M)
        query = _tokens(qkv + first, rows, stride, width, length)
        slope = _tokens(slopes + (image * length * heads + head) * D, rows, heads * D, width, length)
        weights, by_scores, is_open, bucket = _weights_and_slopes(
            query, key, value, slope, rows, cols, ids + image * ids_of_image, by_query + first_by, by_key,
            by_value + first_by, open_keys + image * length, log_sums + first_row, deltas + first_row, bars + first_row,
            stride_by, prefix, scale, length, ON_QUERIES, ON_KEYS, ON_VALUES, MASKED, BEST,
        )  # fmt: skip
        d_value += tl.dot(tl.trans(weights.to(slope.dtype)), slope, input_precision="ieee")
        d_key += tl.dot(tl.trans(by_scores.to(query.dtype)), query, input_precision="ieee")
        if ON_KEYS:
            places = d_by_key + (image * heads + head) * buckets * length + bucket * length + cols[None, :]
            tl.atomic_add(places, by_scores, mask=is_open, sem="relaxed")
    places = d_qkv + first + cols[:, None] * stride + width[None, :]
    tl.store(places + heads * D, (d_key * scale).to(d_qkv.dtype.element_ty), mask=cols[:, None] < length)
    tl.store(places + 2 * heads * D, d_value.to(d_qkv.dtype.element_ty), mask=cols[:, None] < length)
