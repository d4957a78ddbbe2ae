"""Routed attention by kernels of our own, as operators of PyTorch: what starts which kernel, forward and backward.

They are opaque to ``torch.compile`` and can be recorded in a CUDA graph: nothing here waits for the device, and which
kernels run follows from shapes alone. Triton is imported when the first of them runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cytossl_monai.networks.blocks.attention.routed import TILE

__all__ = ["class_scores", "routed_tiles"]

# Programs that a GPU is to have at hand where the queries of an image can be cut into any number of parts.
_PROGRAMS = 512
_EXTRAS = 64  # keys that a program of `backward_extras` takes


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: slots that a step of its loop takes, warps of a program, stages of its pipeline."""

    chunk: int
    warps: int
    stages: int


# Chosen for heads of 64 by what the compilers say: the fewest instructions a pair among those whose registers hold
# everything (on sm_80: all but a few bytes). No time has been measured.
LAUNCHES = {
    "forward_patches": Launch(16, 4, 2),
    "forward_prefix": Launch(64, 4, 2),
    "backward_queries": Launch(16, 4, 2),
    "backward_prefix": Launch(64, 4, 2),
    "backward_keys": Launch(16, 4, 2),
    "backward_extras": Launch(16, 4, 2),
}


def _run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel as `LAUNCHES` says; arguments go by place, what is built into it by name."""
    name = (kernel.fn if hasattr(kernel, "fn") else kernel).__name__
    launch = LAUNCHES.get(name)
    if launch is not None:
        constants |= {"CHUNK": launch.chunk, "num_warps": launch.warps, "num_stages": launch.stages}
    kernel[grid](*arguments, **constants)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors with one stride for all rows and one for all heads, and vectors that lie in one piece."""
    first = tensors[0].stride()
    if first[-1] == 1 and all(tensor.stride() == first for tensor in tensors):
        return tensors
    return tuple(tensor.contiguous() for tensor in tensors)


def _tables(query: Tensor, by_query: Tensor | None, by_key: Tensor | None, bucket_of_offset: Tensor | None) -> Any:
    """Products of iRPE and the buckets as the kernels take them: any pointer and zeros stand for what is missing."""
    reach = 0 if bucket_of_offset is None else bucket_of_offset.shape[0] // 2
    products, strides = [], []
    for product in (by_query, by_key):
        if product is not None and product.stride(-1) != 1:
            product = product.contiguous()
        products.append(query if product is None else product)
        strides += [0, 0] if product is None else [product.stride(1), product.stride(0)]
    return products, strides, query if bucket_of_offset is None else bucket_of_offset, reach


def _prefix_block(num_prefix: int) -> int:
    """Rows of a block that holds all prefix tokens: a power of two, at least what a matrix product takes."""
    return max(16, 1 << (num_prefix - 1).bit_length())


def _tiles(canvas: Tensor, window: int) -> tuple[int, int, int]:
    """Tiles of the batch, and rows and columns of tiles of an image."""
    rows, cols = ((length - 2 * window) // TILE for length in canvas.shape[1:])
    return canvas.shape[0] * rows * cols, rows, cols


@torch.library.custom_op("cytossl::routed_tiles", mutates_args=())
def routed_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    by_query: Tensor | None,
    by_key: Tensor | None,
    extra_rows: Tensor,
    canvas: Tensor,
    sequence_rows: Tensor,
    place: Tensor,
    bucket_of_offset: Tensor | None,
    window: int,
    num_prefix: int,
    first_bucket: int,
    other_bucket: int,
    has_gaps: bool,
) -> tuple[Tensor, Tensor]:
    """Routed attention of all tokens of a batch; differentiable in the first five. Rows of -1 stand for no token.

    Args:
        query: (R, h, d), not scaled.
        key: (R, h, d).
        value: (R, h, d).
        by_query: (h, R, buckets) that ``[query, bucket]`` adds to a score, or None.
        by_key: (h, R, buckets) that ``[key, bucket]`` adds to a score, or None.
        extra_rows: (B, P + m) int32 rows of each image's prefix tokens and salient patches.
        canvas: (B, H + 2 window, W + 2 window) int32 rows of the patches in their places; H and W divide by 8.
        sequence_rows: (B, L) int32 rows of each image's tokens, prefix first.
        place: (R,) int32, ``grid row << 16 | grid column``, or -1 for the first prefix token and -2 for others.
        bucket_of_offset: (2 reach + 1, 2 reach + 1) int32, needed with ``by_query`` or ``by_key``.
        window: rows and columns that a query sees on each side.
        num_prefix: P.
        first_bucket: bucket of the pairs of the first prefix token; the lower of two counts.
        other_bucket: bucket of the pairs of other prefix tokens.
        has_gaps: whether some rows take no part; their output is zero.

    Returns:
        output (R, h, d), and the scores' log-sum-exp (h, R) float32, in powers of two.
    """
    from cytossl_monai.networks.blocks.attention.in_triton import tiled_kernels

    rows, heads, width = query.shape
    query, key, value = _alike(query, key, value)
    products, strides, buckets, reach = _tables(query, by_query, by_key, bucket_of_offset)
    out = (torch.zeros if has_gaps else torch.empty)((rows, heads, width), dtype=query.dtype, device=query.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=query.device)
    tiles, tile_rows, tile_cols = _tiles(canvas, window)
    length, extras = sequence_rows.shape[1], extra_rows.shape[1]
    tensors = (query, key, value, *products)
    numbers = (*query.stride()[:2], *strides, rows, heads)
    last = (reach, first_bucket, other_bucket, width**-0.5)
    flags = {"WIDTH": width, "BY_QUERY": by_query is not None, "BY_KEY": by_key is not None}
    with torch.cuda.device_of(query):
        _run(
            tiled_kernels.forward_patches,
            (tiles * heads,),
            *tensors, canvas, extra_rows, place, buckets, out, lse,
            *numbers, extras, tile_rows, tile_cols, *last,
            WINDOW=window, **flags,
        )  # fmt: skip
        if num_prefix:
            _run(
                tiled_kernels.forward_prefix,
                (canvas.shape[0] * heads,),
                *tensors, sequence_rows, place, buckets, out, lse,
                *numbers, length, num_prefix, *last,
                PREFIX=_prefix_block(num_prefix), **flags,
            )  # fmt: skip
    return out, lse


@routed_tiles.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rows, heads, width = query.shape
    return query.new_empty((rows, heads, width)), query.new_empty((heads, rows), dtype=torch.float32)


@torch.library.custom_op("cytossl::routed_tiles_backward", mutates_args=())
def routed_tiles_backward(
    of_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    by_query: Tensor | None,
    by_key: Tensor | None,
    extra_rows: Tensor,
    canvas: Tensor,
    sequence_rows: Tensor,
    place: Tensor,
    bucket_of_offset: Tensor | None,
    window: int,
    num_prefix: int,
    first_bucket: int,
    other_bucket: int,
    has_gaps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `routed_tiles` from that of its output (R, h, d).

    Returns:
        of query, key and value (R, h, d); of ``by_query`` and ``by_key`` (h, R, buckets) float32, empty where None.
    """
    from cytossl_monai.networks.blocks.attention.in_triton import tiled_backward

    rows, heads, width = query.shape
    batch, length, extras = canvas.shape[0], sequence_rows.shape[1], extra_rows.shape[1]
    query, key, value = _alike(query, key, value)
    of_out = of_out.contiguous()
    products, strides, table, reach = _tables(query, by_query, by_key, bucket_of_offset)
    make = torch.zeros if has_gaps else torch.empty
    of_query, of_key, of_value = (make(query.shape, dtype=query.dtype, device=query.device) for _ in range(3))
    of_products = [
        torch.zeros((0,) if product is None else product.shape, dtype=torch.float32, device=query.device)
        for product in (by_query, by_key)
    ]
    buckets = max(0 if product is None else product.shape[-1] for product in (by_query, by_key))
    delta = torch.empty_like(lse)
    tiles, tile_rows, tile_cols = _tiles(canvas, window)
    tensors = (query, key, value, *products)
    numbers = (*query.stride()[:2], *strides, rows, heads)
    last = (reach, first_bucket, other_bucket, buckets, width**-0.5)
    flags = {"WIDTH": width, "BY_QUERY": by_query is not None, "BY_KEY": by_key is not None}
    with torch.cuda.device_of(query):
        _run(
            tiled_backward.backward_queries,
            (tiles * heads,),
            *tensors, canvas, extra_rows, place, table, out, lse, of_out, delta, of_query, of_products[0],
            *numbers, extras, tile_rows, tile_cols, *last,
            WINDOW=window, **flags,
        )  # fmt: skip
        if num_prefix:
            _run(
                tiled_backward.backward_prefix,
                (batch * heads,),
                *tensors, sequence_rows, place, table, out, lse, of_out, delta, of_query, of_products[0],
                *numbers, length, num_prefix, *last,
                PREFIX=_prefix_block(num_prefix), **flags,
            )  # fmt: skip
        _run(
            tiled_backward.backward_keys,
            (tiles * heads,),
            *tensors, canvas, sequence_rows, place, table, lse, of_out, delta, of_key, of_value, of_products[1],
            *numbers, length, num_prefix, tile_rows, tile_cols, *last,
            WINDOW=window, **flags,
        )  # fmt: skip
        if extras:
            blocks, chunk = -(-extras // _EXTRAS), LAUNCHES["backward_extras"].chunk
            count = max(1, min(-(-length // chunk), _PROGRAMS // max(1, batch * heads * blocks)))
            parts = query.new_empty((2, batch, count, extras, heads, width), dtype=torch.float32)
            _run(
                tiled_backward.backward_extras,
                (batch, blocks, count * heads),  # CUDA's axes but the first end at 65,535
                *tensors, extra_rows, sequence_rows, place, table, lse, of_out, delta, *parts, of_products[1],
                *numbers, length, extras, count, *last,
                WINDOW=window, EXTRAS=_EXTRAS, **flags,
            )  # fmt: skip
            _run(
                tiled_backward.add_parts,
                (batch, blocks, heads),
                extra_rows, *parts, of_key, of_value, heads, extras, num_prefix, count,
                WIDTH=width, EXTRAS=_EXTRAS,
            )  # fmt: skip
    return of_query, of_key, of_value, of_products[0], of_products[1]


@routed_tiles_backward.register_fake
def _(
    of_out: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    by_query: Tensor | None, by_key: Tensor | None, *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = [(0,) if product is None else product.shape for product in (by_query, by_key)]
    of_products = [lse.new_empty(shape) for shape in shapes]
    return out.new_empty(out.shape), out.new_empty(out.shape), out.new_empty(out.shape), of_products[0], of_products[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.settings = inputs[10:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_out: Tensor, of_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *inputs = ctx.saved_tensors
    *of_vectors, of_by_query, of_by_key = routed_tiles_backward(of_out, out, lse, *inputs, *ctx.settings)
    by_query, by_key = inputs[3:5]
    of_products = [
        None if product is None else gradient.to(product.dtype)
        for product, gradient in ((by_query, of_by_query), (by_key, of_by_key))
    ]
    return (*of_vectors, *of_products, *[None] * (len(inputs) - 5 + len(ctx.settings)))


routed_tiles.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("cytossl::class_scores", mutates_args=())
def class_scores(query: Tensor, key: Tensor, sequence_rows: Tensor, num_prefix: int) -> Tensor:
    """Content scores of every patch with its image's class token, in float32; no gradient.

    Args:
        query: (R, h, d), not scaled.
        key: (R, h, d).
        sequence_rows: (B, P + N) int32, -1 where there is no token; the class token is the first.
        num_prefix: P.

    Returns:
        (B, h, N) float32, -inf where there is no patch.
    """
    from cytossl_monai.networks.blocks.attention.in_triton import tiled_kernels

    heads, width = query.shape[1:]
    batch, length = sequence_rows.shape
    query, key = _alike(query, key)
    score = query.new_empty((batch, heads, length - num_prefix), dtype=torch.float32)
    with torch.cuda.device_of(query):
        tiled_kernels.class_scores[(batch * heads, -(-(length - num_prefix) // 64))](
            query, key, sequence_rows, score, *query.stride()[:2], heads, length, num_prefix, width**-0.5,
            WIDTH=width, CHUNK=64, num_warps=4,
        )  # fmt: skip
    return score


@class_scores.register_fake
def _(query: Tensor, key: Tensor, sequence_rows: Tensor, num_prefix: int) -> Tensor:
    batch, length = sequence_rows.shape
    return query.new_empty((batch, query.shape[1], length - num_prefix), dtype=torch.float32)
