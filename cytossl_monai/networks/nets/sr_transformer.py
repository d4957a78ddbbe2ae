"""SR-Transformer: a vision transformer whose attention is sparse and relative (see docs/concepts/sr_transformer.md)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cytossl_monai.networks.blocks.attention.reference import open_share, reach
from cytossl_monai.networks.blocks.background import foreground_patches
from cytossl_monai.networks.blocks.irpe import RPEConfig
from cytossl_monai.networks.blocks.patch_embedding import PatchEmbedding
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention
from cytossl_monai.networks.blocks.sr_block import SRBlock
from cytossl_monai.networks.blocks.stem import ConvolutionalStem
from cytossl_monai.networks.blocks.token_layout import TokenLayout
from cytossl_monai.networks.nets.sr_arguments import (
    background_settings,
    check_patch_mask,
    pair,
    per_layer,
    plain_arguments,
    unseen_patches,
)

__all__ = [
    "Features",
    "SRTransformer",
]

PATCH_EMBEDDINGS = ("patch", "stem")

RPEArgument = RPEConfig | Mapping[str, Any] | str | None


_NEARLY_DENSE = 0.9
"""Share of open pairs above which a network that is asked for sparse attention is told that it is not."""


class Features(NamedTuple):
    """Normed tokens of the last layer.

    Attributes:
        cls: (B, C) the class token, or the mean of the patches where there is none.
        patches: (B, N, C), or (B, K, C) where only K patches were encoded; zero where background was dropped.
        registers: (B, R, C).
        foreground: (B, N) bool of the patches that were encoded, or None when all were.
    """

    cls: Tensor
    patches: Tensor
    registers: Tensor
    foreground: Tensor | None


class SRTransformer(nn.Module):
    """A vision transformer with sparse relative attention, under the arguments and the outputs of MONAI's `ViT`.

    With ``rpe=None, sparsity="none"`` it takes a MONAI ViT's weights (2D) and gives its outputs. Input sizes other than
    ``img_size`` work: position embeddings are interpolated, and iRPE needs no change.

    Args:
        in_channels: channels of the image.
        img_size: rows and columns (or one number) of the image that position embeddings are made for.
        patch_size: rows and columns (or one number) of a patch; divides the image.
        hidden_size: width C of a token.
        mlp_dim: hidden width of the MLPs.
        num_layers: number of blocks.
        num_heads: number of heads; divides ``hidden_size``.
        proj_type: ``conv`` or ``perceptron``.
        pos_embed_type: ``none``, ``learnable``, ``sincos`` or ``fourier``: absolute positions, beside iRPE.
        classification: add a class token and a linear head; `forward` then gives logits.
        num_classes: outputs of the head.
        dropout_rate: dropout, in training only.
        spatial_dims: 2; cytology tiles are planes.
        post_activation: ``Tanh`` puts a tanh after the head, anything else does not (as in MONAI).
        qkv_bias: whether queries, keys and values have a bias.
        save_attn: each block keeps its last attention in ``blocks[i].attn.att_mat``.
        rpe: iRPE of every layer: None, a method's name, the arguments of `RPEConfig`; or a list of these, one a layer.
        sparsity: ``none``, ``topk`` or ``routed``; or a list, one a layer.
        keep_ratio: ``topk`` where ``num_keys`` is None: share of the patches that a patch keeps, in (0, 1].
        num_salient: ``routed``: patches of the image that every patch sees; at most the number of patches at
            ``img_size``. A smaller image uses all its patches at most. None: they grow with each image's grid, 32 of
            the 196 of a 14 x 14 grid.
        window: ``routed``: rows and columns that a patch sees on each side. None: grows with the grid, 3 of 14.
        drop_background: leave patches of blank glass out of all blocks. True, an optical density as threshold, or the
            arguments ``threshold``, ``glass``, ``on_blank`` of `foreground_patches`. None or False: keep everything.
        drop_path_rate: stochastic depth of the last block; earlier ones have less, linearly.
        layer_scale: start of learned factors on the branches, or None.
        num_register_tokens: learned tokens after the class token (Darcet et al., ICLR 2024).
        class_token: whether there is a class token; None: as ``classification`` says (MONAI's way).
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations.
        norm_eps: epsilon of the layer norms (MONAI 1e-5, timm and DINO 1e-6).
        mlp_type: ``gelu`` (two layers) or a gated MLP: ``swiglu`` (DINOv2, timm), ``swiglu_last``, ``geglu``, ``glu``;
            ``mlp_dim`` is then the width of each half.
        qk_norm: layer norms over each head's queries and keys.
        patch_embedding: ``patch`` (one projection of each patch, a ViT's) or ``stem`` (see `ConvolutionalStem`; the
            patch is then square and a power of two, ``proj_type`` is ``conv``).
        stem_norm: normalisation in the stem, ``batch`` or ``group``.
        num_keys: ``topk``: number of keys that a token keeps, whatever the grid (16 in the paper); at most the tokens
            of an image that is encoded whole. None: as ``keep_ratio`` says.
        sparse_prefix: ``topk``: the class token's row and column are bound by the rule, as in the paper.

    Raises:
        ValueError: for arguments outside what is described.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: Sequence[int] | int,
        patch_size: Sequence[int] | int,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        proj_type: str = "conv",
        pos_embed_type: str = "learnable",
        classification: bool = False,
        num_classes: int = 2,
        dropout_rate: float = 0.0,
        spatial_dims: int = 2,
        post_activation: str = "Tanh",
        qkv_bias: bool = False,
        save_attn: bool = False,
        rpe: RPEArgument | Sequence[RPEArgument] = None,
        sparsity: str | Sequence[str] = "none",
        keep_ratio: float = 0.5,
        num_salient: int | None = 32,
        window: int | None = 3,
        drop_background: bool | float | Mapping[str, Any] | None = None,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        num_register_tokens: int = 0,
        class_token: bool | None = None,
        checkpoint_activations: bool = False,
        norm_eps: float = 1e-5,
        mlp_type: str = "gelu",
        qk_norm: bool = False,
        patch_embedding: str = "patch",
        stem_norm: str = "batch",
        num_keys: int | None = None,
        sparse_prefix: bool = False,
    ) -> None:
        if num_layers < 1 or num_register_tokens < 0:
            raise ValueError(
                f"num_layers must be at least 1 and registers not negative; got {num_layers} and {num_register_tokens}."
            )
        rpes = [RPEConfig.parse(one) for one in per_layer(rpe, num_layers, "rpe")]
        rpe = rpes if isinstance(rpe, list | tuple) else rpes[0]
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__", "rpes")}
        super().__init__()
        self.config: dict[str, Any] = {name: plain_arguments(value) for name, value in arguments.items()}
        if spatial_dims != 2:
            raise ValueError(f"SRTransformer is for images, spatial_dims=2; got {spatial_dims}.")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1); got {drop_path_rate}.")
        if classification and class_token is False:
            raise ValueError("classification needs the class token: leave class_token out or set it.")
        has_class_token = classification if class_token is None else class_token
        sizes, patches = pair(img_size, "img_size"), pair(patch_size, "patch_size")
        if patch_embedding not in PATCH_EMBEDDINGS:
            raise ValueError(f"patch_embedding must be one of {', '.join(PATCH_EMBEDDINGS)}; got {patch_embedding!r}.")
        self.patch_embedding: PatchEmbedding
        if patch_embedding == "stem":
            if proj_type != "conv":
                raise ValueError(f"A stem is made of convolutions: leave proj_type at 'conv'; got {proj_type!r}.")
            self.patch_embedding = ConvolutionalStem(
                in_channels, sizes, patches, hidden_size, num_heads, pos_embed_type, dropout_rate, stem_norm
            )
        else:
            self.patch_embedding = PatchEmbedding(
                in_channels, sizes, patches, hidden_size, num_heads, proj_type, pos_embed_type, dropout_rate
            )
        rows, cols = self.patch_embedding.grid
        sparsities = per_layer(sparsity, num_layers, "sparsity")
        salient, near = reach((rows, cols), num_salient, window)
        if "routed" in sparsities and salient > rows * cols:
            raise ValueError(f"num_salient {salient} exceeds the {rows * cols} patches of a {rows} x {cols} grid.")
        if "routed" in sparsities and (share := open_share((rows, cols), salient, near)) > _NEARLY_DENSE:
            warnings.warn(
                f"routed attention leaves {share:.0%} of the pairs of a {rows} x {cols} grid open with window {near} "
                f"and {salient} salient patches: that is dense attention. Take smaller ones (null: they grow with the "
                "grid), or sparsity 'none'.",
                stacklevel=2,
            )
        if "topk" in sparsities and num_keys is not None and _NEARLY_DENSE < (share := num_keys / (rows * cols)) <= 1:
            warnings.warn(
                f"topk attention leaves {share:.0%} of the pairs of a {rows} x {cols} grid open with num_keys "
                f"{num_keys}: that is dense attention. Take a smaller num_keys, or sparsity 'none'.",
                stacklevel=2,
            )
        has_topk = "topk" in sparsities and num_keys is not None
        self.least_tokens = int(num_keys or 0) if has_topk else 0  # of an image that is encoded whole
        self.tokens_beside = int(has_class_token) + num_register_tokens if sparse_prefix else 0
        self._check_num_keys(rows, cols)
        self.hidden_size = hidden_size
        self.embed_dim = hidden_size
        self.patch_size = patches
        self.classification = classification
        self.has_class_token = has_class_token
        self.num_prefix = int(has_class_token) + num_register_tokens
        self.checkpoint_activations = checkpoint_activations
        self.drop_background = background_settings(drop_background)
        self.blocks = nn.ModuleList(
            SRBlock(
                SparseAttention(
                    hidden_size,
                    num_heads,
                    dropout_rate,
                    qkv_bias,
                    rpes[i],
                    sparsities[i],
                    keep_ratio,
                    num_salient,
                    window,
                    has_class_token,
                    num_register_tokens > 0,
                    save_attn,
                    norm_eps if qk_norm else None,
                    num_keys,
                    sparse_prefix,
                ),
                hidden_size,
                mlp_dim,
                dropout_rate,
                drop_path_rate * i / max(1, num_layers - 1),
                layer_scale,
                norm_eps,
                mlp_type,
            )
            for i in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.apply(_init_weights)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if has_class_token else None
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, hidden_size)) if num_register_tokens else None
        )
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        self.classification_head: nn.Module | None = None
        if classification:
            head = nn.Linear(hidden_size, num_classes)
            self.classification_head = nn.Sequential(head, nn.Tanh()) if post_activation == "Tanh" else head
        self.register_load_state_dict_pre_hook(_drop_unused_monai_keys)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image of that size."""
        return self.patch_embedding.grid_size(height, width)

    def forward(self, x: Tensor, foreground: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Encode images.

        Args:
            x: (B, in_channels, H, W) float; in [0, 1] where ``drop_background`` is to find the glass by itself.
            foreground: (B, N) bool of the patches to encode, in raster order; None: all, or what ``drop_background``
                finds. Tokens left out come back as zeros in their places.

        Returns:
            as MONAI's ViT: normed tokens (B, prefix + N, C), class token first, then registers, then patches; or
            logits (B, num_classes) with ``classification``. And the list of every block's output tokens.

        Raises:
            ValueError: for an image that the patch does not divide, a mask of another shape, an all blank image.
        """
        tokens, layout, kept = self._embed(x, foreground=foreground)
        hidden = []
        for block in self.blocks:
            tokens = self._run(block, tokens, layout)
            hidden.append(self._to_grid(tokens, layout, kept))
        tokens = self._to_grid(self.norm(tokens), layout, kept)
        if self.classification_head is not None:
            return self.classification_head(tokens[:, 0]), hidden
        return tokens, hidden

    def forward_features(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        keep: Tensor | None = None,
        foreground: Tensor | None = None,
    ) -> Features:
        """Encode images for self-supervised methods.

        Args:
            x: see `forward`.
            mask: (B, N) bool: patches whose embedding is replaced by ``mask_token`` before positions are added (iBOT).
            mask_token: (C,), needed with ``mask``.
            keep: (B, K) int64: the only patches to encode, by raster index (MAE). Background is then not looked for.
            foreground: see `forward`.

        Returns:
            `Features`.

        Raises:
            ValueError: see `forward`; also for masks or indices of another shape.
        """
        tokens, layout, kept = self._embed(x, mask, mask_token, keep, foreground)
        for block in self.blocks:
            tokens = self._run(block, tokens, layout)
        tokens = self._to_grid(self.norm(tokens), layout, kept)
        first = int(self.has_class_token)
        patches = tokens[:, self.num_prefix :]
        if self.has_class_token:
            cls = tokens[:, 0]
        elif kept is None:
            cls = patches.mean(dim=1)
        else:
            cls = patches.sum(dim=1) / kept.sum(dim=1, keepdim=True)
        return Features(cls, patches, tokens[:, first : self.num_prefix], kept)

    def _run(self, block: nn.Module, tokens: Tensor, layout: TokenLayout) -> Tensor:
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, tokens, layout, use_reentrant=False)
            return out
        return block(tokens, layout)  # type: ignore[no-any-return]

    def _embed(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        keep: Tensor | None = None,
        foreground: Tensor | None = None,
    ) -> tuple[Tensor, TokenLayout, Tensor | None]:
        """Tokens with positions and prefix, their layout, and (B, N) bool of the patches kept (None: all)."""
        if x.dim() != 4:
            raise ValueError(f"Images must be (B, C, H, W); got a tensor of shape {tuple(x.shape)}.")
        batch = x.shape[0]
        grid = self.grid_size(int(x.shape[-2]), int(x.shape[-1]))
        self._check_num_keys(*grid)
        cells = grid[0] * grid[1]
        if foreground is None and keep is None and self.drop_background is not None:
            foreground = foreground_patches(x, self.patch_size, **self.drop_background)
        tokens = self.patch_embedding.embed(x, unseen_patches(mask, keep, batch, cells))
        if mask is not None:
            if mask_token is None:
                raise ValueError("mask needs mask_token: the embedding that replaces masked patches.")
            tokens = torch.where(mask.unsqueeze(-1), mask_token.to(tokens.dtype), tokens)
        tokens = self.patch_embedding.dropout(tokens + self.patch_embedding.positions(grid))
        layout = TokenLayout(batch, grid, self.num_prefix, self.has_class_token)
        prefix = [t.expand(batch, -1, -1) for t in (self.cls_token, self.register_tokens) if t is not None]
        if keep is not None:
            if foreground is not None:
                raise ValueError("Give keep or foreground, not both.")
            tokens = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            layout.positions = keep
        if foreground is None:
            return torch.cat([*prefix, tokens], dim=1), layout, None
        check_patch_mask(foreground, batch, cells, "foreground")
        counts = foreground.sum(dim=1).tolist()
        if min(counts) == 0:
            blank = [image for image, count in enumerate(counts) if count == 0]
            raise ValueError(f"foreground keeps no patch of image(s) {blank}: all tokens blank. Leave them out.")
        if min(counts) == cells:
            return torch.cat([*prefix, tokens], dim=1), layout, foreground
        layout.counts = counts
        layout.positions = foreground.nonzero()[:, 1]
        packed = torch.cat([*prefix, tokens], dim=1)[_with_prefix(foreground, self.num_prefix)]
        return packed, layout, foreground

    def _check_num_keys(self, rows: int, cols: int) -> None:
        tokens = rows * cols + self.tokens_beside
        if self.least_tokens > tokens:
            raise ValueError(
                f"num_keys {self.least_tokens} exceeds the {tokens} tokens of an image of {rows} x {cols} patches: "
                "lower num_keys, or encode larger images (the smallest views: views#local_size)."
            )

    def _to_grid(self, tokens: Tensor, layout: TokenLayout, kept: Tensor | None) -> Tensor:
        """Packed tokens back in their places, (B, prefix + N, C), zeros where a patch was dropped."""
        if not layout.packed or kept is None:
            return tokens
        places = _with_prefix(kept, self.num_prefix)
        full = tokens.new_zeros(*places.shape, tokens.shape[-1])
        return full.index_put((places,), tokens)


def _with_prefix(mask: Tensor, num_prefix: int) -> Tensor:
    return torch.cat([mask.new_ones(mask.shape[0], num_prefix), mask], dim=1)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _drop_unused_monai_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """MONAI's ViT carries weights that it never uses (``norm_cross_attn``, old ``cross_attn``): leave them out."""
    for name in [name for name in state_dict if name.startswith(prefix + "blocks.") and "cross_attn." in name]:
        del state_dict[name]
