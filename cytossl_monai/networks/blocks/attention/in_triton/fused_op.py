"""The operator behind `fused`: attention of batched pairs, forward and backward, as PyTorch sees it.

What iRPE needs of a query or key for each bucket is one matrix product, (batch, tokens, heads, buckets), in which the
kernels look up; the backward pass makes it again rather than keep it. An operator of its own, so that ``torch.compile``
does not look into it and a CUDA graph may record it. It never waits for the device.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["attend_pairs", "keys_of_a_block"]

# Queries of a block, and warps, by the keys of a block: the largest that (nearly) keep all numbers in registers, by the
# compiler's word for compute capability 8.0 and 9.0. Of the backward pass a block has 32 queries, 32 keys and 4 warps.
FORWARD = {16: (32, 4), 32: (32, 4), 64: (32, 4), 128: (32, 8), 256: (16, 4), 512: (16, 8)}
_BLOCK = 32


def keys_of_a_block(length: int) -> int:
    """Keys that a block of the forward pass holds: a power of two, at least what Triton multiplies at once."""
    return max(16, 2 ** math.ceil(math.log2(length)))


@torch.library.custom_op("cytossl::fused_attention", mutates_args=())
def attend_pairs(
    qkv: Tensor,
    ids: Tensor | None,
    bias: Tensor | None,
    by_query: Tensor | None,
    by_key: Tensor | None,
    by_value: Tensor | None,
    open_keys: Tensor | None,
    numbers: Tensor | None,
    number: int,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of `fused_attention`, with what its backward pass needs.

    Args:
        qkv: (B, L, 3, h, d), contiguous.
        ids: (1 or B, L, L) integers, or None where there are no tables.
        bias: (h or 1, buckets), or None.
        by_query: (h or 1, buckets, d) multiplied by the scaled query, or None: ``key`` of `RPETables`.
        by_key: the same, multiplied by the scaled key: ``query`` of `RPETables`.
        by_value: the same, added to the value.
        open_keys: (B, L) bool, or None.
        numbers: (B,) int32 best keys by image, or None: ``number``.
        number: best keys that a query keeps; 0: all.
        num_prefix: so many first queries and keys are exempt.

    Returns:
        the result (B, L, h, d); log-sums and bars (B, h, L) float32; shares (B, L, h, buckets) of the values' tables.
    """
    from cytossl_monai.networks.blocks.attention.in_triton.fused_kernels import attend_rows

    call = _Call(qkv, ids, bias, by_query, by_key, by_value, open_keys, number, num_prefix)
    out, log_sums, bars, shares = _empty_results(qkv, by_value, number)
    rows_at_once, warps = FORWARD[call.all_keys]
    with call.device():
        attend_rows[call.grid(rows_at_once)](
            *call.given(),
            *(call.stand_in(part) for part in (open_keys, numbers)),
            out,
            shares.zero_(),
            log_sums,
            bars,
            *call.sizes(),
            number,
            num_prefix,
            call.scale,
            M=rows_at_once,
            N=call.all_keys,
            BY_IMAGE=numbers is not None,
            **call.switches,
            num_warps=warps,
            num_stages=1,
        )
    shares = shares.to(qkv.dtype)
    if by_value is not None:
        out += _by_bucket_back(shares, by_value)
    return out, log_sums, bars, shares


def _empty_results(qkv: Tensor, by_value: Tensor | None, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, length, heads, width)
    log_sums = qkv.new_empty(batch, heads, length, dtype=torch.float32)
    bars = qkv.new_empty(batch, heads, length if number else 0, dtype=torch.float32)
    buckets = 0 if by_value is None else by_value.shape[1]
    return out, log_sums, bars, qkv.new_empty(batch, length, heads, buckets, dtype=torch.float32)


@attend_pairs.register_fake
def _(qkv, ids, bias, by_query, by_key, by_value, open_keys, numbers, number, num_prefix):  # type: ignore[no-untyped-def]
    out, log_sums, bars, shares = _empty_results(qkv, by_value, number)
    return out, log_sums, bars, shares.to(qkv.dtype)


@torch.library.custom_op("cytossl::fused_attention_backward", mutates_args=())
def _fused_backward(
    slope: Tensor,
    out: Tensor,
    log_sums: Tensor,
    bars: Tensor,
    shares: Tensor,
    qkv: Tensor,
    ids: Tensor | None,
    bias: Tensor | None,
    by_query: Tensor | None,
    by_key: Tensor | None,
    by_value: Tensor | None,
    open_keys: Tensor | None,
    number: int,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slopes by ``qkv``, ``bias`` and the three tables; of those that are None, without elements."""
    from cytossl_monai.networks.blocks.attention.in_triton.fused_kernels import backward_cols, backward_rows

    call = _Call(qkv, ids, bias, by_query, by_key, by_value, open_keys, number, num_prefix)
    slope = slope.contiguous()
    deltas = (slope.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    slopes_of_shares = None if by_value is None else _by_bucket(slope, by_value)
    d_qkv = torch.empty_like(qkv)
    products = [torch.zeros_like(part, dtype=torch.float32) for part in call.products]
    given = (*call.given(), call.stand_in(slopes_of_shares), call.stand_in(open_keys))
    blocks = {"M": _BLOCK, "N": _BLOCK, "num_warps": 4, "num_stages": 2, **call.switches}
    with call.device():
        for kernel, product in zip((backward_rows, backward_cols), products, strict=True):
            kernel[call.grid(_BLOCK)](
                *given, slope, log_sums, deltas, bars, d_qkv, product, *call.sizes(), num_prefix, call.scale, **blocks
            )
    d_query, d_key = (product.to(qkv.dtype) for product in products)
    d_bias, d_by_query, d_by_key, d_by_value = (qkv.new_empty(0) for _ in range(4))
    if bias is not None:
        d_bias = products[0].sum((0, 1))
        d_bias = (d_bias.sum(0, keepdim=True) if bias.shape[0] == 1 else d_bias).to(bias.dtype)
    if by_query is not None:
        d_by_query = _of_table(d_query, qkv[:, :, 0] * call.scale, by_query)
        d_qkv[:, :, 0] += _by_bucket_back(d_query, by_query) * call.scale
    if by_key is not None:
        d_key = d_key.permute(0, 3, 1, 2)
        d_by_key = _of_table(d_key, qkv[:, :, 1] * call.scale, by_key)
        d_qkv[:, :, 1] += _by_bucket_back(d_key, by_key) * call.scale
    if by_value is not None:
        d_by_value = _of_table(shares, slope, by_value)
    return d_qkv, d_bias, d_by_query, d_by_key, d_by_value


@_fused_backward.register_fake
def _(slope, out, log_sums, bars, shares, qkv, ids, bias, by_query, by_key, by_value, *rest):  # type: ignore[no-untyped-def]
    tables = (bias, by_query, by_key, by_value)
    return torch.empty_like(qkv), *(qkv.new_empty(0) if t is None else torch.empty_like(t) for t in tables)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _numbers, number, num_prefix = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.numbers = number, num_prefix
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _back(ctx: Any, slope: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if slope is None:
        return (None,) * 10
    tables = ctx.saved_tensors[6:10]
    d_qkv, *d_tables = _fused_backward(slope, *ctx.saved_tensors, *ctx.numbers)
    return (
        d_qkv,
        None,
        *(None if t is None else d for t, d in zip(tables, d_tables, strict=True)),
        *(None,) * 4,
    )


attend_pairs.register_autograd(_back, setup_context=_remember)


class _Call:
    """What the three kernels are given alike."""

    def __init__(
        self,
        qkv: Tensor,
        ids: Tensor | None,
        bias: Tensor | None,
        by_query: Tensor | None,
        by_key: Tensor | None,
        by_value: Tensor | None,
        open_keys: Tensor | None,
        number: int,
        num_prefix: int,
    ) -> None:
        self.qkv, self.ids = qkv, ids
        self.batch, self.length, _, self.heads, self.width = qkv.shape
        self.scale = self.width**-0.5
        self.all_keys = keys_of_a_block(self.length)
        tables = [table for table in (bias, by_query, by_key, by_value) if table is not None]
        self.buckets = tables[0].shape[1] if tables else 0
        empty = qkv.new_empty(0)
        of_query, of_key = empty, empty
        if by_query is not None:
            of_query = _by_bucket(qkv[:, :, 0] * self.scale, by_query)
        if bias is not None:  # a number a bucket is the same for every query
            spread = bias.to(qkv.dtype).expand(self.batch, self.length, self.heads, -1)
            of_query = spread.contiguous() if by_query is None else of_query + spread
        if by_key is not None:
            # Buckets first: neighbouring keys, which a block looks up together, then lie side by side.
            of_key = _by_bucket(qkv[:, :, 1] * self.scale, by_key).permute(0, 2, 3, 1).contiguous()
        self.products = of_query, of_key
        self.switches = {
            "D": self.width,
            "ON_QUERIES": of_query.numel() > 0,
            "ON_KEYS": of_key.numel() > 0,
            "ON_VALUES": by_value is not None,
            "MASKED": open_keys is not None,
            "BEST": number > 0,
        }

    def stand_in(self, part: Tensor | None) -> Tensor:
        """A kernel wants an address, also of what it will not read."""
        return self.qkv if part is None else part

    def given(self) -> tuple[Tensor, ...]:
        """Tokens, buckets of the pairs, products by bucket."""
        return self.qkv, self.stand_in(self.ids), *self.products

    def sizes(self) -> tuple[int, int, int, int]:
        """Tokens, heads, buckets, and what lies between two images' buckets of pairs."""
        shared = self.ids is None or self.ids.shape[0] == 1
        return self.length, self.heads, self.buckets, 0 if shared else self.length**2

    def grid(self, block: int) -> tuple[int]:
        """Programs, in one row: CUDA's other axes end at 65,535."""
        return (self.batch * self.heads * -(-self.length // block),)

    def device(self) -> contextlib.AbstractContextManager[Any]:
        """Triton starts kernels on the current device."""
        return torch.cuda.device(self.qkv.device) if self.qkv.is_cuda else contextlib.nullcontext()


def _by_bucket(tokens: Tensor, table: Tensor) -> Tensor:
    """(B, L, h, d) and (h or 1, buckets, d) -> (B, L, h, buckets): the product with each bucket's encoding."""
    table = table.to(tokens.dtype)
    if table.shape[0] == 1:
        return tokens @ table[0].T
    return torch.einsum("blhd,hnd->blhn", tokens, table).contiguous()


def _by_bucket_back(products: Tensor, table: Tensor) -> Tensor:
    """(B, L, h, buckets) and (h or 1, buckets, d) -> (B, L, h, d)."""
    table = table.to(products.dtype)
    return products @ table[0] if table.shape[0] == 1 else torch.einsum("blhn,hnd->blhd", products, table)


def _of_table(products: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
    """(B, L, h, buckets) and (B, L, h, d) -> the slope by ``table`` (h or 1, buckets, d)."""
    if table.shape[0] == 1:
        return (products.flatten(0, 2).T @ tokens.flatten(0, 2)).unsqueeze(0).to(table.dtype)
    return torch.einsum("blhn,blhd->hnd", products, tokens).to(table.dtype)
