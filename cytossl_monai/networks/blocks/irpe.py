"""Image relative position encoding (iRPE): where a key lies as seen from a query, as a learned term of attention.

Wu et al., "Rethinking and Improving Relative Position Encoding for Vision Transformer", ICCV 2021.
A pair of patches is sorted into one of a few *buckets* by its offset; near offsets get a bucket each, far ones share.
Since buckets depend on offsets only, an encoding trained on one grid serves on any other, without interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["IRPE", "METHODS", "MODES", "RPEConfig", "RPETables", "bucket_table", "piecewise_index"]

METHODS = ("euclid", "quant", "quant_squared", "cross", "product")
MODES = ("bias", "contextual")


def piecewise_index(x: np.ndarray, alpha: float, beta: float, gamma: float) -> np.ndarray:
    """The paper's piecewise index function g: exact near zero, logarithmic further out, constant from ``gamma`` on.

    ``g(x) = round(x)`` for ``|x| <= alpha``, else
    ``sign(x) * min(beta, round(alpha + ln(|x| / alpha) / ln(gamma / alpha) * (beta - alpha)))``.

    The paper leaves open what a ``beta`` that is no integer does (ratio 1.9 gives 3.8): the authors' code cuts the
    result towards zero, so that indices end at ``int(beta)``. So does this function.

    Args:
        x: distances or signed offsets in patches, any shape.
        alpha: end of the exact part.
        beta: largest index.
        gamma: distance at which ``beta`` is reached.

    Returns:
        int64 array of ``x``'s shape, values in ``[-int(beta), int(beta)]``.
    """
    x = np.asarray(x, dtype=np.float64)
    size = np.maximum(np.abs(x), alpha)
    far = np.minimum(np.round(alpha + np.log(size / alpha) / math.log(gamma / alpha) * (beta - alpha)), beta)
    return np.where(np.abs(x) <= alpha, np.round(x), np.sign(x) * np.trunc(far)).astype(np.int64)


@lru_cache(maxsize=64)
def _bucket_table(method: str, alpha: float, beta: float, gamma: float) -> np.ndarray:
    reach = math.ceil(gamma)
    last = int(beta)
    offsets = np.arange(-reach, reach + 1)
    dy, dx = np.meshgrid(offsets, offsets, indexing="ij")
    if method in ("product", "cross"):
        rows = piecewise_index(dy, alpha, beta, gamma) + last
        cols = piecewise_index(dx, alpha, beta, gamma) + last
        return rows * (2 * last + 1) + cols
    squared = dy**2 + dx**2
    if method == "euclid":
        distance = np.round(np.sqrt(squared))
    elif method == "quant":
        # Rank among all the distances that an unbounded grid has, so that it does not depend on the grid at hand.
        side = np.arange(2 * reach + 1)
        distance = np.searchsorted(np.unique(side[:, None] ** 2 + side[None] ** 2), squared)
    else:
        distance = squared
    return piecewise_index(distance, alpha, beta, gamma) + last


def bucket_table(method: str, alpha: float, beta: float, gamma: float) -> np.ndarray:
    """Bucket of every offset (query minus key) within ``ceil(gamma)`` patches; farther ones equal the rim's.

    Args:
        method: one of `METHODS`; ``cross`` is given by the buckets of ``product`` (row bucket times columns + column
            bucket), since its encoding is the sum of a row's and a column's.
        alpha: see `piecewise_index`.
        beta: see `piecewise_index`.
        gamma: see `piecewise_index`.

    Returns:
        int64 array (2R+1, 2R+1) with ``R = ceil(gamma)``; entry ``[dy + R, dx + R]``.
    """
    return _bucket_table(method, float(alpha), float(beta), float(gamma)).copy()


@dataclass(frozen=True)
class RPEConfig:
    """How relative positions are encoded.

    Args:
        method: how an offset becomes a bucket.
            ``product``: row and column offsets indexed on their own, one vector a pair of indices (the paper's best);
            ``cross``: the same indices, the sum of a row vector and a column vector;
            ``euclid``: the rounded distance; ``quant``: the rank of the distance (0, 1, 1.41, 2 -> 0, 1, 2, 3), as the
            paper's text has it; ``quant_squared``: the squared distance, which is what the authors' released code
            computes under the name "quant". The two differ from the rank 3 on.
        mode: ``bias``: a number a bucket and head, added to the scaled score; ``contextual``: a vector a bucket,
            multiplied by the query (or key) and scaled as the score is. On the values a bucket always holds a vector.
        on: which of queries, keys and values carry an encoding: any of the letters ``q``, ``k``, ``v``.
            ``k`` adds ``q_i . r_ij``, ``q`` adds ``k_j . r_ij``, ``v`` adds ``r_ij`` to ``v_j``. All use the bucket of
            the pair (i, j); the authors' code looks up (j, i) for ``q``, which renames the buckets and nothing more.
        ratio: scales alpha, beta, gamma = 1, 2, 8 together. 1.9 in the paper's best model: 49 buckets for ``product``.
        shared_heads: one table for all heads, as in the paper's best model, or one a head.
    """

    method: str = "product"
    mode: str = "contextual"
    on: str = "k"
    ratio: float = 1.9
    shared_heads: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"rpe method must be one of {', '.join(METHODS)}; got {self.method!r}.")
        if self.mode not in MODES:
            raise ValueError(f"rpe mode must be one of {', '.join(MODES)}; got {self.mode!r}.")
        if not self.on or len(set(self.on)) != len(self.on) or set(self.on) - set("qkv"):
            raise ValueError(f"rpe 'on' must name each of q, k, v at most once and at least one; got {self.on!r}.")
        if not self.ratio > 0:
            raise ValueError(f"rpe ratio must be above 0; got {self.ratio}.")

    @classmethod
    def parse(cls, value: RPEConfig | Mapping[str, Any] | str | None) -> RPEConfig | None:
        """Read what a configuration file may hold: None, a method's name, or a mapping of this class's arguments.

        Raises:
            ValueError: for unknown names.
        """
        if value is None or isinstance(value, RPEConfig):
            return value
        if isinstance(value, str):
            return None if value == "none" else cls(method=value)
        if not isinstance(value, Mapping):
            raise ValueError(f"rpe must be None, a method's name or a mapping; got {type(value).__name__}.")
        # YAML reads the bare word `on` as true.
        value = {"on" if name is True else name: entry for name, entry in value.items()}
        unknown = set(value) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"rpe does not know {sorted(unknown, key=str)}; it takes {sorted(cls.__dataclass_fields__)}."
            )
        return cls(**value)

    @property
    def bounds(self) -> tuple[float, float, float]:
        """Alpha, beta and gamma."""
        return 1.0 * self.ratio, 2.0 * self.ratio, 8.0 * self.ratio

    @property
    def side(self) -> int:
        """Number of indices along one axis."""
        return 2 * int(self.bounds[1]) + 1

    @property
    def num_spatial_buckets(self) -> int:
        """Number of buckets for pairs of patches."""
        return self.side**2 if self.method in ("product", "cross") else self.side


@dataclass(frozen=True)
class RPETables:
    """The encodings of one layer as attention kernels read them; ``h`` is the number of heads or 1.

    Attributes:
        bias: (h, buckets) added to the score, or None.
        key: (h, buckets, head_dim) multiplied by the scaled query, or None.
        query: (h, buckets, head_dim) multiplied by the scaled key, or None.
        value: (h, buckets, head_dim) added to the value, or None.
    """

    bias: Tensor | None = None
    key: Tensor | None = None
    query: Tensor | None = None
    value: Tensor | None = None


class IRPE(nn.Module):
    """The learned tables of iRPE for one attention layer, and the bucket of every pair of tokens.

    Tables start at zero: a network that gets an `IRPE` computes at first what it computed before.

    The class token has a bucket of its own, in which every pair with the class token falls, as in the paper. Of other
    tokens before the patches the paper says nothing; here pairs with a register (and not with the class token) share
    one more bucket.

    Args:
        config: see `RPEConfig`.
        head_dim: width of a head.
        num_heads: number of heads.
        has_class_token: whether the first token is a class token.
        has_registers: whether further tokens stand before the patches.
    """

    bucket_of_offset: Tensor
    key_table: nn.Parameter | None
    query_table: nn.Parameter | None
    value_table: nn.Parameter | None

    def __init__(
        self,
        config: RPEConfig,
        head_dim: int,
        num_heads: int,
        has_class_token: bool = True,
        has_registers: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.num_heads = num_heads
        spatial = config.num_spatial_buckets
        self.class_bucket = spatial
        self.register_bucket = spatial + int(has_class_token)
        self.num_buckets = spatial + int(has_class_token) + int(has_registers)
        self.has_class_token = has_class_token
        self.has_registers = has_registers
        self.reach = math.ceil(config.bounds[2])
        table = torch.from_numpy(bucket_table(config.method, *config.bounds))
        # Derived from the configuration, so it is no part of the weights.
        self.register_buffer("bucket_of_offset", table, persistent=False)

        heads = 1 if config.shared_heads else num_heads
        # `cross` stores row vectors, then column vectors, then those of the prefix tokens.
        stored = 2 * config.side + self.num_buckets - spatial if config.method == "cross" else self.num_buckets
        names = {"k": "key_table", "q": "query_table", "v": "value_table"}
        for letter, name in names.items():
            if letter not in config.on:
                self.register_parameter(name, None)
            elif config.mode == "bias" and letter != "v":
                self.register_parameter(name, nn.Parameter(torch.zeros(heads, stored)))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(heads, stored, head_dim)))

    def _expand(self, table: Tensor | None) -> Tensor | None:
        """Tables of ``cross`` as tables over product buckets: the sum of a row's and a column's encoding."""
        if table is None or self.config.method != "cross":
            return table
        side = self.config.side
        rows, cols, rest = table[:, :side], table[:, side : 2 * side], table[:, 2 * side :]
        spatial = (rows.unsqueeze(2) + cols.unsqueeze(1)).flatten(1, 2)
        return torch.cat([spatial, rest], dim=1)

    def tables(self) -> RPETables:
        """The encodings over buckets, with gradients to the parameters."""
        key, query, value = (self._expand(t) for t in (self.key_table, self.query_table, self.value_table))
        if self.config.mode == "contextual":
            return RPETables(key=key, query=query, value=value)
        bias = key if query is None else query if key is None else key + query
        return RPETables(bias=bias, value=value)

    def buckets(self, dy: Tensor, dx: Tensor) -> Tensor:
        """Buckets of pairs of patches.

        Args:
            dy: row of the query minus row of the key, int64, any shape.
            dx: the same for columns.

        Returns:
            int64 buckets of that shape.
        """
        reach = self.reach
        flat = (dy.clamp(-reach, reach) + reach) * (2 * reach + 1) + dx.clamp(-reach, reach) + reach
        return self.bucket_of_offset.flatten()[flat]

    def prefix_buckets(self, num_prefix: int, device: torch.device | None = None) -> Tensor:
        """Buckets of pairs of a patch with each prefix token: (num_prefix,) int64."""
        ids = torch.full((num_prefix,), self.register_bucket, dtype=torch.long, device=device)
        if self.has_class_token and num_prefix:
            ids[:1].fill_(self.class_bucket)  # a GPU would be waited for over `ids[0] = number`
        return ids

    def pair_buckets(self, rows: Tensor, cols: Tensor, num_prefix: int) -> Tensor:
        """Buckets of all pairs of a sequence of prefix tokens and patches.

        Args:
            rows: (..., N) int64 grid rows of the patches.
            cols: (..., N) int64 grid columns.
            num_prefix: P, tokens before the patches.

        Returns:
            (..., P + N, P + N) int64.
        """
        ids = self.buckets(rows.unsqueeze(-1) - rows.unsqueeze(-2), cols.unsqueeze(-1) - cols.unsqueeze(-2))
        if num_prefix == 0:
            return ids
        lead, n = ids.shape[:-2], ids.shape[-1]
        prefix = self.prefix_buckets(num_prefix, ids.device)
        left = prefix.expand(*lead, n, num_prefix)
        corner = torch.minimum(prefix.unsqueeze(0), prefix.unsqueeze(1))  # the class token's bucket is the lower one
        top = torch.cat([corner, prefix.unsqueeze(1).expand(num_prefix, n)], dim=1).expand(*lead, num_prefix, -1)
        return torch.cat([top, torch.cat([left, ids], dim=-1)], dim=-2)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        c = self.config
        return f"{c.method}, {c.mode}, on={c.on}, ratio={c.ratio}, buckets={self.num_buckets}"
