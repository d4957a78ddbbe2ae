"""Batched attention of short sequences in Triton: the published attention without its passes over all pairs.

PyTorch's operations read and write (batch, heads, tokens, tokens) a dozen times for the best keys and iRPE. Here a
block of queries holds its scores from the product of queries and keys to the sum of values (`fused_kernels`).

**No GPU has run these kernels yet**: they are proven in Triton's interpreter and compiled ahead. So they are used only
where ``CYTOSSL_TRITON_ATTENTION=1`` asks for them, and are first tried against the other path (`fused_pays`).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cytossl_monai.networks.blocks.attention.dense import attend
from cytossl_monai.networks.blocks.attention.in_triton.fused_op import attend_pairs, keys_of_a_block
from cytossl_monai.networks.blocks.attention.in_triton.trial import constant_in_graphs, exporting, tried, triton_asked
from cytossl_monai.networks.blocks.irpe import RPETables

__all__ = ["fused_attention", "fused_pays", "short_ids"]

LONGEST = 512  # tokens whose scores a block of 16 queries can hold

logger = logging.getLogger(__name__)


def fused_pays(
    qkv: Tensor,
    tables: RPETables | None,
    mask: Tensor | None,
    keep: tuple[int, Tensor | None] | None,
    dropout: float,
) -> bool:
    """Whether the kernels are asked for and can do what is asked.

    They take CUDA with Triton (``CYTOSSL_TRITON_ATTENTION=1``), at most `LONGEST` tokens, 16 bits a number, heads of
    16, 32, 64 or 128 numbers, no dropout, no mask but one of keys, and no ``torch.use_deterministic_algorithms``. Plain
    dense attention is left to PyTorch. A small batch is computed by both paths first, forward and backward: where the
    kernels cannot be built or differ, a warning says so and they are not used.

    Args:
        qkv: (B, L, 3, h, d).
        tables: encodings, or None.
        mask: bool, or None; taken where it is (B, 1, 1, L), of the keys.
        keep: see `attend`.
        dropout: probability of dropping an attention weight.
    """
    length, heads, width = qkv.shape[1], qkv.shape[-2], qkv.shape[-1]
    if not triton_asked(qkv) or dropout != 0 or exporting() or (tables is None and keep is None):
        return False
    if torch.are_deterministic_algorithms_enabled():  # slopes by bucket are summed in no fixed order
        return False
    if length > LONGEST or width not in (16, 32, 64, 128) or (mask is not None and mask.shape[1:3] != (1, 1)):
        return False
    shapes = tuple(None if table is None else tuple(table.shape) for table in _parts(tables))
    best = None if keep is None else "by image" if keep[1] is not None else "of all"
    # Images of a packed batch have many lengths, but blocks of keys few.
    length = keys_of_a_block(length) - 3
    return _right(qkv.device, _dtype(qkv), length, heads, width, shapes, mask is not None, best)


def _parts(tables: RPETables | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    return (None,) * 4 if tables is None else (tables.bias, tables.key, tables.query, tables.value)


def _dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in: that of autocast where it is on, as products of matrices do."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


@constant_in_graphs
def _right(*asked: Any) -> bool:
    return _tried(*asked)


@lru_cache(maxsize=64)
def _tried(
    device: torch.device,
    dtype: torch.dtype,
    length: int,
    heads: int,
    width: int,
    shapes: tuple[tuple[int, ...] | None, ...],
    masked: bool,
    best: str | None,
) -> bool:
    """Whether the kernels are built here and give what the other path gives, for two images.

    The same kernels as of the layer that asks: the shapes of tables (bias, on keys, on queries, on values), whether
    keys are masked, and how many are kept (``of all`` alike, ``by image``, or None: all) are built into them.
    """

    def attempt() -> list[tuple[Tensor, Tensor]]:
        drawn = torch.Generator().manual_seed(0)
        qkv = torch.randn(2, length, 3, heads, width, generator=drawn)
        qkv[:, :, 0] *= 3.0  # scores lie far apart: which are the best does not hang on their last digit
        qkv = qkv.to(device, dtype).requires_grad_()
        parts = [None if s is None else (0.3 * torch.randn(s, generator=drawn)).to(device) for s in shapes]
        tables = RPETables(*(None if part is None else part.requires_grad_() for part in parts))
        buckets = next((s[1] for s in shapes if s is not None), 0)
        pairs = torch.randint(buckets, (length, length), generator=drawn).to(device) if buckets else None
        ids = None if pairs is None else short_ids(pairs, buckets)
        mask = (torch.rand(2, 1, 1, length, generator=drawn) > 0.2).to(device) if masked else None
        number = max(1, length // 3)
        numbers = torch.tensor([number, number // 2 + 1], device=device).view(2, 1, 1, 1)
        keep = None if best is None else (number, numbers if best == "by image" else None)
        slope = torch.randn(2, length, heads * width, generator=drawn).to(device, dtype)
        inputs = [qkv, *(part for part in _parts(tables) if part is not None)]
        # The other path in float32, for in 16 bits its own sums are the less exact.
        got = fused_attention(qkv, ids, tables, mask, keep, 1)
        query, key, value = qkv.float().permute(2, 0, 3, 1, 4)
        wanted = attend(query, key, value, pairs, tables, mask, keep, 1)[0].transpose(1, 2).flatten(2)
        gradients = [torch.autograd.grad(out, inputs, slope.to(out.dtype)) for out in (got, wanted)]
        return [(got, wanted), *zip(*gradients, strict=True)]

    return tried("fused attention", device, attempt, logger)


def short_ids(ids: Tensor, buckets: int) -> Tensor:
    """Buckets of pairs in the integers that the kernels read fastest."""
    return ids.to(torch.int16 if buckets < 2**15 else torch.int32)


def fused_attention(
    qkv: Tensor,
    ids: Tensor | None,
    tables: RPETables | None,
    mask: Tensor | None,
    keep: tuple[int, Tensor | None] | None,
    num_prefix: int,
) -> Tensor:
    """As `attend` with these arguments, without dropout; scores and the choice of the best keys are in float32.

    Args:
        qkv: (B, L, 3, h, d), queries not scaled; L at most `LONGEST`.
        ids: buckets of the pairs, (L, L), (B, 1, L, L) or (B, L, L), integers (int16 is read fastest); needed with
            ``tables``.
        tables: encodings, or None.
        mask: bool (B, 1, 1, L) of the keys, or None.
        keep: see `attend`.
        num_prefix: see `attend`.

    Returns:
        (B, L, h * d) of the dtype that a product of ``qkv`` has (autocast's, where it is on).
    """
    bias, by_query, by_key, by_value = _parts(tables)
    batch, length = qkv.shape[:2]
    number, numbers = keep or (0, None)
    out: Tensor = attend_pairs(
        qkv.to(_dtype(qkv)).contiguous(),
        None if ids is None else ids.reshape(-1, length, length),
        bias,
        by_query,
        by_key,
        by_value,
        None if mask is None else mask.reshape(batch, length),
        None if numbers is None else numbers.reshape(batch).int(),
        number,
        num_prefix,
    )[0]
    return out.flatten(2)
