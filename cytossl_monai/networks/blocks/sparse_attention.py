"""Self-attention that is sparse and relative: one module, several kernels behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cytossl_monai.networks.blocks.attention.dense import attend
from cytossl_monai.networks.blocks.attention.flex import flex_pays, flex_routed_attention
from cytossl_monai.networks.blocks.attention.in_triton.fused import fused_attention, fused_pays, short_ids
from cytossl_monai.networks.blocks.attention.in_triton.tiled import tiled_pays, tiled_routed_attention
from cytossl_monai.networks.blocks.attention.reference import attention_mask, num_kept, reach, reference_attention
from cytossl_monai.networks.blocks.attention.routed import routed_attention, tiles_pay
from cytossl_monai.networks.blocks.irpe import IRPE, RPEConfig
from cytossl_monai.networks.blocks.token_layout import TokenLayout

__all__ = ["SPARSITIES", "SparseAttention"]

SPARSITIES = ("none", "topk", "routed")
# Packed images whose lengths differ by less than this factor share one padded matrix product.
_LENGTH_RATIO = 0.85


class SparseAttention(nn.Module):
    """Multi-head self-attention with iRPE and a choice of which keys a query keeps.

    Parameters have the names of MONAI's `SABlock` (``qkv``, ``out_proj``), with the tables of `IRPE` beside them.
    What the modes mean is written in `cytossl_monai.networks.blocks.attention.reference`.

    Args:
        hidden_size: width C of the tokens.
        num_heads: number of heads; divides ``hidden_size``.
        dropout_rate: dropout of attention weights and output, in training only.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        rpe: relative position encoding: None, a method's name, or the arguments of `RPEConfig`.
        sparsity: ``none``, ``topk`` or ``routed``.
        keep_ratio: for ``topk`` where ``num_keys`` is None: share of the patches that a query keeps, in (0, 1].
        num_salient: for ``routed``: patches that every patch of the image sees; None: they grow with the image's grid.
        window: for ``routed``: rows and columns that a patch sees on each side; None: it grows too (`reach`).
        has_class_token: whether the first token is a class token.
        has_registers: whether further prefix tokens follow it.
        save_attn: keep the attention of the last forward pass in ``att_mat`` (B, h, L, L), without gradient.
        qk_norm: epsilon of a layer norm over each head's queries and keys (``q_norm``, ``k_norm``); None: none.
        num_keys: for ``topk``: an absolute number of keys that a query keeps, 16 in the paper; all where an image has
            fewer tokens.
        sparse_prefix: for ``topk``: class token and registers choose, and are chosen, as patches are (the paper's
            way); else they keep every key and every query keeps them.

    Raises:
        ValueError: for arguments outside what is described.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout_rate: float = 0.0,
        qkv_bias: bool = False,
        rpe: RPEConfig | Mapping[str, Any] | str | None = None,
        sparsity: str = "none",
        keep_ratio: float = 0.5,
        num_salient: int | None = 32,
        window: int | None = 3,
        has_class_token: bool = True,
        has_registers: bool = False,
        save_attn: bool = False,
        qk_norm: float | None = None,
        num_keys: int | None = None,
        sparse_prefix: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= dropout_rate < 1:
            raise ValueError(f"dropout_rate must lie in [0, 1); got {dropout_rate}.")
        if num_heads < 1 or hidden_size % num_heads != 0:
            raise ValueError(f"hidden_size must be divisible by num_heads; got {hidden_size} and {num_heads}.")
        if sparsity not in SPARSITIES:
            raise ValueError(f"sparsity must be one of {', '.join(SPARSITIES)}; got {sparsity!r}.")
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio must lie in (0, 1]; got {keep_ratio}.")
        if num_keys is not None and num_keys < 1:
            raise ValueError(f"num_keys must be at least 1; got {num_keys}.")
        if (num_salient or 0) < 0 or (window or 0) < 0:
            raise ValueError(f"num_salient and window must not be negative; got {num_salient} and {window}.")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.sparsity = sparsity
        self.keep_ratio = keep_ratio
        self.num_keys = num_keys
        self.sparse_prefix = sparse_prefix
        self.num_salient = num_salient
        self.window = window
        self.save_attn = save_attn
        self.dropout_rate = dropout_rate
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.drop_output = nn.Dropout(dropout_rate)
        self.q_norm = None if qk_norm is None else nn.LayerNorm(self.head_dim, eps=qk_norm)
        self.k_norm = None if qk_norm is None else nn.LayerNorm(self.head_dim, eps=qk_norm)
        config = RPEConfig.parse(rpe)
        self.irpe = None if config is None else IRPE(config, self.head_dim, num_heads, has_class_token, has_registers)
        self.att_mat: Tensor | None = None

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Attend.

        Args:
            x: (B, P + N, C) tokens, or (rows, C) where the layout is packed.
            layout: where the tokens lie.

        Returns:
            a tensor of ``x``'s shape.

        Raises:
            ValueError: when ``x`` and ``layout`` do not fit.
        """
        qkv = self._heads(x)
        if layout.packed:
            out = self._packed(qkv, layout)
        else:
            expected = layout.num_prefix + layout.num_patches
            if x.shape[-2] != expected:
                raise ValueError(f"{x.shape[-2]} tokens were given, but the layout has {expected}.")
            out = self._batched(qkv, layout)
        if self.save_attn:
            self._save(qkv.detach(), layout)
        return self.drop_output(self.out_proj(out))

    def _heads(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3, h, d): queries, keys and values, the first two normed where ``qk_norm`` says so."""
        qkv: Tensor = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if self.q_norm is None or self.k_norm is None:
            return qkv
        query, key, value = qkv.unbind(-3)
        return torch.stack([self.q_norm(query), self.k_norm(key), value], dim=-3)

    def _dropout(self) -> float:
        return self.dropout_rate if self.training else 0.0

    def _batched(self, qkv: Tensor, layout: TokenLayout) -> Tensor:
        """(B, L, 3, h, d) -> (B, L, C)."""
        num_salient, window = reach(layout.grid, self.num_salient, self.window)
        if self.sparsity == "routed" and tiles_pay(layout, window, num_salient):
            rows = qkv.flatten(0, 1)
            out = self._routed(rows, layout)
            return out.view(qkv.shape[0], qkv.shape[1], -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        ids = None
        if self.irpe is not None:
            irpe = self.irpe
            ids = layout.remember(("pair ids", irpe.config), lambda: self._pair_ids(irpe, layout, key.device))
        key_mask = layout.key_mask()
        mask = None if key_mask is None else key_mask[:, None, None, :]
        if self.sparsity == "routed" and not self._sees_all(layout):
            mask = attention_mask(
                query.new_zeros(()).expand(*query.shape[:3], query.shape[2]),
                query.detach() * self.head_dim**-0.5,
                key.detach(),
                layout,
                "routed",
                num_salient=num_salient,
                window=window,
            )
        keep = self._keep(layout) if self.sparsity == "topk" else None
        tables = None if self.irpe is None else self.irpe.tables()
        exempt = 0 if self.sparse_prefix else layout.num_prefix
        if fused_pays(qkv, tables, mask, keep, self._dropout()):
            if ids is not None and self.irpe is not None:
                pairs, buckets = ids, self.irpe.num_buckets
                ids = layout.remember(("short pair ids", self.irpe.config), lambda: short_ids(pairs, buckets))
            return fused_attention(qkv, ids, tables, mask, keep, exempt)
        out, _ = attend(query, key, value, ids, tables, mask, keep, exempt, self._dropout())
        out = out.transpose(1, 2)
        if torch.onnx.is_in_onnx_export():
            # The exporter replaces attention by its formula, whose result lies otherwise in memory: no view of it.
            out = out.clone(memory_format=torch.contiguous_format)
        return out.flatten(2)

    def _sees_all(self, layout: TokenLayout) -> bool:
        """Whether every patch sees every other, by its window or because all are salient: then nothing is routed."""
        num_salient, window = reach(layout.grid, self.num_salient, self.window)
        return max(layout.grid) <= window + 1 or num_salient >= layout.num_patches

    @staticmethod
    def _pair_ids(irpe: IRPE, layout: TokenLayout, device: torch.device) -> Tensor:
        ids = irpe.pair_buckets(*layout.rows_and_cols(device), layout.num_prefix)
        return ids.unsqueeze(1) if ids.dim() == 3 else ids

    def _keep(self, layout: TokenLayout) -> tuple[int, Tensor | None] | None:
        """How many keys each query keeps: one number, or one an image where some patches take no part."""
        always = layout.num_prefix if self.sparse_prefix else 0
        tokens = layout.num_patches + always
        number = num_kept(self.keep_ratio, tokens, self.num_keys)
        if layout.valid is None:
            return None if number >= tokens else (number, None)
        counts = layout.valid.sum(dim=1) + always
        by_image = (counts * self.keep_ratio - 1e-9).ceil().long() if self.num_keys is None else counts
        return number, by_image.clamp(1, self.num_keys).view(-1, 1, 1, 1)

    def _routed(self, qkv: Tensor, layout: TokenLayout) -> Tensor:
        """(R, 3, h, d) -> (R, C)."""
        query, key, value = qkv.unbind(1)
        num_salient, window = reach(layout.grid, self.num_salient, self.window)
        if tiled_pays(query, self.irpe, window, self._dropout()):
            out = tiled_routed_attention(query, key, value, layout, self.irpe, window, num_salient)
        elif flex_pays(query, self.irpe, self._dropout()):
            out = flex_routed_attention(query, key, value, layout, self.irpe, window, num_salient)
        else:
            out = routed_attention(query, key, value, layout, self.irpe, window, num_salient, self._dropout())
        return out.flatten(1)

    def _packed(self, qkv: Tensor, layout: TokenLayout) -> Tensor:
        """(rows, 3, h, d) -> (rows, C): images of like length share a padded product, so that padding costs little."""
        num_salient, window = reach(layout.grid, self.num_salient, self.window)
        if self.sparsity == "routed" and tiles_pay(layout, window, num_salient):
            return self._routed(qkv, layout)
        out = qkv.new_zeros(qkv.shape[0], self.hidden_size)
        for rows, real, group in layout.remember("groups", lambda: _groups(layout, qkv.device)):
            padded = self._batched(qkv[rows], group)
            out = out.index_copy(0, rows[real], padded[real])
        return out

    @torch.no_grad()
    def _save(self, qkv: Tensor, layout: TokenLayout) -> None:
        """Attention over all pairs, computed apart from the kernel, which does not give it."""
        num_salient, window = reach(layout.grid, self.num_salient, self.window)
        chosen = (self.keep_ratio, num_salient, window, self.num_keys, self.sparse_prefix)
        settings = (self.irpe, self.sparsity, *chosen)
        if not layout.packed:
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            self.att_mat = reference_attention(query, key, value, layout, *settings)[1]
            return
        cells = layout.grid[0] * layout.grid[1]
        prefix = layout.num_prefix
        full = qkv.new_zeros(layout.batch, self.num_heads, prefix + cells, prefix + cells)
        starts, positions, first = layout.offsets(), layout.positions, 0
        assert layout.counts is not None
        assert positions is not None
        for image, count in enumerate(layout.counts):
            query, key, value = qkv[starts[image] : starts[image + 1]].unsqueeze(0).permute(2, 0, 3, 1, 4)
            own = positions[first : first + count].unsqueeze(0)
            single = TokenLayout(1, layout.grid, prefix, layout.has_class_token, own)
            weights = reference_attention(query, key, value, single, *settings)[1][0]
            at = torch.cat([torch.arange(prefix, device=own.device), own[0] + prefix])
            full[image][:, at.unsqueeze(1), at.unsqueeze(0)] = weights
            first += count
        self.att_mat = full


def _groups(layout: TokenLayout, device: torch.device) -> list[tuple[Tensor, Tensor, TokenLayout]]:
    """Images of a packed batch in groups of like length.

    Returns:
        for each group: rows (G, L) padded with row 0, real (G, L) bool, and the group's batched layout.
    """
    assert layout.counts is not None
    assert layout.positions is not None
    counts, starts, prefix = layout.counts, layout.offsets(), layout.num_prefix
    order = sorted(range(layout.batch), key=lambda image: -counts[image])
    members: list[list[int]] = []
    for image in order:
        if members and counts[image] >= _LENGTH_RATIO * counts[members[-1][0]]:
            members[-1].append(image)
        else:
            members.append([image])
    groups = []
    for images in members:
        longest = counts[images[0]]
        first = torch.tensor([starts[i] for i in images], device=device).unsqueeze(1)
        number = torch.tensor([counts[i] for i in images], device=device).unsqueeze(1)
        steps = torch.arange(prefix + longest, device=device)
        real = steps < number + prefix
        rows = torch.where(real, first + steps, 0)
        patch_first = torch.tensor([starts[i] - i * prefix for i in images], device=device).unsqueeze(1)
        index = torch.where(real[:, prefix:], patch_first + steps[:longest], 0)
        valid = None if min(counts[i] for i in images) == longest else real[:, prefix:]
        group = TokenLayout(len(images), layout.grid, prefix, layout.has_class_token, layout.positions[index], valid)
        groups.append((rows, real, group))
    return groups
