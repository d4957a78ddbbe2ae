# mypy: disallow-untyped-defs=False
"""Triton kernels of routed attention, backward. Words and arguments are those of the forward ones beside this file.

Every gradient of a vector has one owner, so that no program waits for another: a tile's queries are its program's; a
tile's keys are those of a program that walks over the halo of *queries* (the window is symmetric) and its image's
prefix queries. Keys that a whole image sees (prefix tokens, salient patches) are summed by parts of the image, which
`add_parts` adds to their rows. Only gradients of iRPE's products are gathered by atomic sums, for open pairs alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cytossl_monai.networks.blocks.attention.in_triton.tiled_kernels import (
    NO_BUCKET,
    NUMBERS,
    TILE,
    canvas_rows,
    is_near,
    listed_rows,
    places,
    prefix_bucket,
    scores,
    seen_from_tile,
    slot_rows,
    times,
    vectors,
)


@triton.jit
def of_scores(score, seen, lse, of_weight, delta):
    """Weights, and the gradient of the scores in natural units."""
    weight = tl.where(seen, tl.exp2(score - lse), 0.0)
    return weight, weight * (of_weight - delta)


@triton.jit
def numbers(ptr, row, head, rows):
    """A number a token, of (heads, rows)."""
    return tl.load(ptr + head * rows + row, mask=row >= 0, other=0.0)


@triton.jit
def store_vectors(ptr, row, head, heads, vector, WIDTH: tl.constexpr):
    """Write (n, WIDTH) into rows of a contiguous (rows, heads, WIDTH)."""
    at = (row.to(tl.int64)[:, None] * heads + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(ptr + at, vector.to(ptr.dtype.element_ty), mask=(row >= 0)[:, None])


@triton.jit
def of_output(of_out_ptr, out_ptr, delta_ptr, row, head, rows, heads, WIDTH: tl.constexpr):
    """The output's gradient, and its product with the output (delta), which is kept for the keys' programs."""
    of_out = vectors(of_out_ptr, row, head, heads * WIDTH, WIDTH, WIDTH)
    out = vectors(out_ptr, row, head, heads * WIDTH, WIDTH, WIDTH)
    delta = tl.sum(of_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head * rows + row, delta, mask=row >= 0)
    return of_out, delta


@triton.jit(do_not_specialize=NUMBERS)
def backward_queries(
    q_ptr, k_ptr, v_ptr, by_query_ptr, by_key_ptr, canvas_ptr, extra_ptr, place_ptr, bucket_ptr,
    out_ptr, lse_ptr, of_out_ptr, delta_ptr, of_q_ptr, of_by_query_ptr,
    stride_row, stride_head, by_query_row, by_query_head, by_key_row, by_key_head,
    rows, heads, extras, tile_rows, tile_cols, reach, first_bucket, other_bucket, buckets, scale,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, BY_QUERY: tl.constexpr, BY_KEY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile's queries and of their products, over the slots of `forward_patches`."""
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    q_row = canvas_rows(canvas_ptr, tile, tile_rows, tile_cols, tl.arange(0, TILE * TILE), WINDOW, 0)
    if tl.max(q_row) < 0:
        return
    q_place = places(place_ptr, q_row)
    query = vectors(q_ptr, q_row, head, stride_row, stride_head, WIDTH)
    of_out, delta = of_output(of_out_ptr, out_ptr, delta_ptr, q_row, head, rows, heads, WIDTH)
    lse = numbers(lse_ptr, q_row, head, rows)
    halo: tl.constexpr = (TILE + 2 * WINDOW) * (TILE + 2 * WINDOW)

    of_query = tl.full((TILE * TILE, WIDTH), 0.0, tl.float32)
    for start in range(0, extras + halo, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        k_row = slot_rows(canvas_ptr, extra_ptr, tile, tile_rows, tile_cols, extras, slot, WINDOW)
        k_place = places(place_ptr, k_row)
        key = vectors(k_ptr, k_row, head, stride_row, stride_head, WIDTH)
        value = vectors(v_ptr, k_row, head, stride_row, stride_head, WIDTH)
        seen = seen_from_tile(q_row, q_place, k_row, k_place, slot, WINDOW)
        score, bucket = scores(
            times(query, tl.trans(key)), q_row[:, None], q_place[:, None], k_row[None, :], k_place[None, :],
            prefix_bucket(k_place, first_bucket, other_bucket)[None, :],
            seen, head, scale, bucket_ptr, reach,
            by_query_ptr, by_key_ptr, by_query_row, by_query_head, by_key_row, by_key_head, BY_QUERY, BY_KEY,
        )  # fmt: skip
        _, of_score = of_scores(score, seen, lse[:, None], times(of_out, tl.trans(value)), delta[:, None])
        of_query += times(of_score.to(key.dtype), key)
        if BY_QUERY:
            mine = of_by_query_ptr + head.to(tl.int64) * rows * buckets
            tl.atomic_add(mine + (q_row[:, None] * buckets + bucket), of_score, mask=seen, sem="relaxed")
    store_vectors(of_q_ptr, q_row, head, heads, of_query * scale, WIDTH)


@triton.jit(do_not_specialize=NUMBERS)
def backward_prefix(
    q_ptr, k_ptr, v_ptr, by_query_ptr, by_key_ptr, sequence_ptr, place_ptr, bucket_ptr,
    out_ptr, lse_ptr, of_out_ptr, delta_ptr, of_q_ptr, of_by_query_ptr,
    stride_row, stride_head, by_query_row, by_query_head, by_key_row, by_key_head,
    rows, heads, length, prefix, reach, first_bucket, other_bucket, buckets, scale,
    WIDTH: tl.constexpr, PREFIX: tl.constexpr, BY_QUERY: tl.constexpr, BY_KEY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of one image's prefix queries and of their products, over the keys of `forward_prefix`."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence_ptr += image * length
    q_row = listed_rows(sequence_ptr, tl.arange(0, PREFIX), 0, prefix)
    q_place = places(place_ptr, q_row)
    query = vectors(q_ptr, q_row, head, stride_row, stride_head, WIDTH)
    of_out, delta = of_output(of_out_ptr, out_ptr, delta_ptr, q_row, head, rows, heads, WIDTH)
    lse = numbers(lse_ptr, q_row, head, rows)

    q_bucket = prefix_bucket(q_place, first_bucket, other_bucket)
    of_query = tl.full((PREFIX, WIDTH), 0.0, tl.float32)
    of_patches = tl.full((PREFIX,), 0.0, tl.float32)  # all patches fall in one bucket: one sum
    for start in range(0, length, CHUNK):
        k_row = listed_rows(sequence_ptr, start + tl.arange(0, CHUNK), 0, length)
        k_place = places(place_ptr, k_row)
        key = vectors(k_ptr, k_row, head, stride_row, stride_head, WIDTH)
        value = vectors(v_ptr, k_row, head, stride_row, stride_head, WIDTH)
        seen = (q_row >= 0)[:, None] & (k_row >= 0)[None, :]
        score, bucket = scores(
            times(query, tl.trans(key)), q_row[:, None], q_place[:, None], k_row[None, :], k_place[None, :],
            tl.minimum(q_bucket[:, None], prefix_bucket(k_place, first_bucket, other_bucket)[None, :]),
            seen, head, scale, bucket_ptr, reach,
            by_query_ptr, by_key_ptr, by_query_row, by_query_head, by_key_row, by_key_head, BY_QUERY, BY_KEY,
        )  # fmt: skip
        _, of_score = of_scores(score, seen, lse[:, None], times(of_out, tl.trans(value)), delta[:, None])
        of_query += times(of_score.to(key.dtype), key)
        if BY_QUERY:
            of_patches += tl.sum(tl.where((k_place >= 0)[None, :], of_score, 0.0), 1)
            mine = of_by_query_ptr + head.to(tl.int64) * rows * buckets
            tl.atomic_add(
                mine + (q_row[:, None] * buckets + bucket), of_score, mask=seen & (k_place < 0)[None, :], sem="relaxed"
            )
    store_vectors(of_q_ptr, q_row, head, heads, of_query * scale, WIDTH)
    if BY_QUERY:
        mine = of_by_query_ptr + head.to(tl.int64) * rows * buckets
        tl.atomic_add(mine + (q_row * buckets + q_bucket), of_patches, mask=q_row >= 0, sem="relaxed")


@triton.jit(do_not_specialize=NUMBERS)
def backward_keys(
    q_ptr, k_ptr, v_ptr, by_query_ptr, by_key_ptr, canvas_ptr, sequence_ptr, place_ptr, bucket_ptr,
    lse_ptr, of_out_ptr, delta_ptr, of_k_ptr, of_v_ptr, of_by_key_ptr,
    stride_row, stride_head, by_query_row, by_query_head, by_key_row, by_key_head,
    rows, heads, length, prefix, tile_rows, tile_cols, reach, first_bucket, other_bucket, buckets, scale,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, BY_QUERY: tl.constexpr, BY_KEY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile's keys and values, from the patches in whose window they lie and from prefix queries.

    What the image's other patches add to a salient key is left to `backward_extras`.
    """
    tile, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    k_row = canvas_rows(canvas_ptr, tile, tile_rows, tile_cols, tl.arange(0, TILE * TILE), WINDOW, 0)
    if tl.max(k_row) < 0:
        return
    k_place = places(place_ptr, k_row)
    key = vectors(k_ptr, k_row, head, stride_row, stride_head, WIDTH)
    value = vectors(v_ptr, k_row, head, stride_row, stride_head, WIDTH)
    sequence_ptr += tile // (tile_rows * tile_cols) * length
    halo: tl.constexpr = (TILE + 2 * WINDOW) * (TILE + 2 * WINDOW)

    of_key = tl.full((TILE * TILE, WIDTH), 0.0, tl.float32)
    of_value = tl.full((TILE * TILE, WIDTH), 0.0, tl.float32)
    for start in range(0, prefix + halo, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        q_row = tl.maximum(
            canvas_rows(canvas_ptr, tile, tile_rows, tile_cols, slot, WINDOW, WINDOW),
            listed_rows(sequence_ptr, slot, halo, prefix),
        )
        q_place = places(place_ptr, q_row)
        query = vectors(q_ptr, q_row, head, stride_row, stride_head, WIDTH)
        of_out = vectors(of_out_ptr, q_row, head, heads * WIDTH, WIDTH, WIDTH)
        lse, delta = numbers(lse_ptr, q_row, head, rows), numbers(delta_ptr, q_row, head, rows)
        seen = is_near(q_place[None, :], k_place[:, None], WINDOW) | (q_place < 0)[None, :]
        seen &= (k_row >= 0)[:, None] & (q_row >= 0)[None, :]
        score, bucket = scores(
            times(key, tl.trans(query)), q_row[None, :], q_place[None, :], k_row[:, None], k_place[:, None],
            prefix_bucket(q_place, first_bucket, other_bucket)[None, :],
            seen, head, scale, bucket_ptr, reach,
            by_query_ptr, by_key_ptr, by_query_row, by_query_head, by_key_row, by_key_head, BY_QUERY, BY_KEY,
        )  # fmt: skip
        weight, of_score = of_scores(score, seen, lse[None, :], times(value, tl.trans(of_out)), delta[None, :])
        of_value += times(weight.to(of_out.dtype), of_out)
        of_key += times(of_score.to(query.dtype), query)
        if BY_KEY:
            mine = of_by_key_ptr + head.to(tl.int64) * rows * buckets
            tl.atomic_add(mine + (k_row[:, None] * buckets + bucket), of_score, mask=seen, sem="relaxed")
    store_vectors(of_k_ptr, k_row, head, heads, of_key * scale, WIDTH)
    store_vectors(of_v_ptr, k_row, head, heads, of_value, WIDTH)


@triton.jit(do_not_specialize=NUMBERS)
def backward_extras(
    q_ptr, k_ptr, v_ptr, by_query_ptr, by_key_ptr, extra_ptr, sequence_ptr, place_ptr, bucket_ptr,
    lse_ptr, of_out_ptr, delta_ptr, part_k_ptr, part_v_ptr, of_by_key_ptr,
    stride_row, stride_head, by_query_row, by_query_head, by_key_row, by_key_head,
    rows, heads, length, extras, parts, reach, first_bucket, other_bucket, buckets, scale,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, BY_QUERY: tl.constexpr, BY_KEY: tl.constexpr,
    EXTRAS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of ``EXTRAS`` keys that a whole image sees, from one part of its queries.

    Program (image, block of keys, part * heads + head). Sums go to (images, parts, extras, heads, WIDTH) in float32.
    """
    part, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    image = tl.program_id(0)
    number = tl.program_id(1) * EXTRAS + tl.arange(0, EXTRAS)
    k_row = listed_rows(extra_ptr + image * extras, number, 0, extras)
    k_place = places(place_ptr, k_row)
    key = vectors(k_ptr, k_row, head, stride_row, stride_head, WIDTH)
    value = vectors(v_ptr, k_row, head, stride_row, stride_head, WIDTH)
    sequence_ptr += image * length

    k_bucket = prefix_bucket(k_place, first_bucket, other_bucket)
    of_key = tl.full((EXTRAS, WIDTH), 0.0, tl.float32)
    of_value = tl.full((EXTRAS, WIDTH), 0.0, tl.float32)
    of_patches = tl.full((EXTRAS,), 0.0, tl.float32)  # a prefix key has one bucket with all patches: one sum
    for start in range(part * CHUNK, length, parts * CHUNK):
        q_row = listed_rows(sequence_ptr, start + tl.arange(0, CHUNK), 0, length)
        q_place = places(place_ptr, q_row)
        query = vectors(q_ptr, q_row, head, stride_row, stride_head, WIDTH)
        of_out = vectors(of_out_ptr, q_row, head, heads * WIDTH, WIDTH, WIDTH)
        lse, delta = numbers(lse_ptr, q_row, head, rows), numbers(delta_ptr, q_row, head, rows)
        # Salient patches met their window and the prefix queries in `backward_keys`.
        far = (q_place >= 0)[None, :] & ~is_near(q_place[None, :], k_place[:, None], WINDOW)
        seen = far | (k_place < 0)[:, None]
        seen &= (k_row >= 0)[:, None] & (q_row >= 0)[None, :]
        score, bucket = scores(
            times(key, tl.trans(query)), q_row[None, :], q_place[None, :], k_row[:, None], k_place[:, None],
            tl.minimum(k_bucket[:, None], prefix_bucket(q_place, first_bucket, other_bucket)[None, :]),
            seen, head, scale, bucket_ptr, reach,
            by_query_ptr, by_key_ptr, by_query_row, by_query_head, by_key_row, by_key_head, BY_QUERY, BY_KEY,
        )  # fmt: skip
        weight, of_score = of_scores(score, seen, lse[None, :], times(value, tl.trans(of_out)), delta[None, :])
        of_value += times(weight.to(of_out.dtype), of_out)
        of_key += times(of_score.to(query.dtype), query)
        if BY_KEY:
            one_bucket = (k_place < 0)[:, None] & (q_place >= 0)[None, :]
            of_patches += tl.sum(tl.where(one_bucket, of_score, 0.0), 1)
            mine = of_by_key_ptr + head.to(tl.int64) * rows * buckets
            tl.atomic_add(mine + (k_row[:, None] * buckets + bucket), of_score, mask=seen & ~one_bucket, sem="relaxed")
    at = (((image * parts + part).to(tl.int64) * extras + number)[:, None] * heads + head) * WIDTH
    at += tl.arange(0, WIDTH)[None, :]
    tl.store(part_k_ptr + at, of_key * scale, mask=(number < extras)[:, None])
    tl.store(part_v_ptr + at, of_value, mask=(number < extras)[:, None])
    if BY_KEY:
        mine = of_by_key_ptr + head.to(tl.int64) * rows * buckets
        tl.atomic_add(
            mine + (k_row * buckets + k_bucket), of_patches, mask=(k_row >= 0) & (k_bucket != NO_BUCKET), sem="relaxed"
        )


@triton.jit(do_not_specialize=NUMBERS)
def add_parts(
    extra_ptr, part_k_ptr, part_v_ptr, of_k_ptr, of_v_ptr, heads, extras, prefix, parts,
    WIDTH: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """Add what `backward_extras` summed to the keys' rows: those of prefix tokens begin here, the others had a start.

    Program (image, block of keys, head); a row is among an image's keys once.
    """
    image, head = tl.program_id(0), tl.program_id(2)
    number = tl.program_id(1) * EXTRAS + tl.arange(0, EXTRAS)
    row = listed_rows(extra_ptr + image * extras, number, 0, extras)
    started = tl.where(number >= prefix, row, -1)
    of_key = vectors(of_k_ptr, started, head, heads * WIDTH, WIDTH, WIDTH).to(tl.float32)
    of_value = vectors(of_v_ptr, started, head, heads * WIDTH, WIDTH, WIDTH).to(tl.float32)
    for part in range(0, parts):
        at = (((image * parts + part) * extras + number)[:, None].to(tl.int64) * heads + head) * WIDTH
        at += tl.arange(0, WIDTH)[None, :]
        of_key += tl.load(part_k_ptr + at, mask=(number < extras)[:, None], other=0.0)
        of_value += tl.load(part_v_ptr + at, mask=(number < extras)[:, None], other=0.0)
    store_vectors(of_k_ptr, row, head, heads, of_key, WIDTH)
    store_vectors(of_v_ptr, row, head, heads, of_value, WIDTH)
