"""The transformer heads of MONAI's ``MILModel`` behind this package's contract: masks, attention, features in."""

from typing import Any

import torch
from monai.networks.nets import MILModel as MONAIMILModel
from torch import Tensor, nn

from cytossl_monai.networks.mil.base import MILModel, MILOutput, masked_softmax

__all__ = ["PYRAMID_DIMS", "MONAIHead", "MONAIPyramidHead"]

PYRAMID_DIMS = (256, 512, 1024, 2048)
"""Widths of a ResNet-50's four levels, averaged over the image."""


class MONAIHead(MILModel):
    """MONAI's ``att_trans``: a transformer encoder over all tiles, then attention pooling (Myronenko et al., 2021).

    The layers are those of ``monai.networks.nets.MILModel`` itself, so weights trained there load here. What is added:
    padding is masked, the attention is given out, the tiles of a bag may be features. The order does not matter.
    Time grows with the square of the bag; memory does not, as attention is computed in blocks.

    Args:
        in_features: width D of the features.
        n_outputs: number of logits.
        embed_dim: width that the features are brought to first, a multiple of 8; None keeps them (then D must be).
        trans_blocks: transformer layers.
        trans_dropout: dropout in them.
    """

    def __init__(
        self,
        in_features: int,
        n_outputs: int,
        embed_dim: int | None = 256,
        trans_blocks: int = 2,
        trans_dropout: float = 0.1,
    ) -> None:
        super().__init__(in_features, n_outputs)
        width = in_features if embed_dim is None else embed_dim
        if width % 8:
            raise ValueError(f"the transformer's 8 heads must divide its width, which is {width}; set embed_dim")
        self.embed_dim, self.trans_blocks, self.trans_dropout = embed_dim, trans_blocks, float(trans_dropout)
        self.embed = nn.Identity() if embed_dim is None else nn.Linear(in_features, embed_dim)
        self.head = MONAIMILModel(
            n_outputs,
            mil_mode="att_trans",
            backbone=nn.Identity(),
            backbone_num_features=width,
            trans_blocks=trans_blocks,
            trans_dropout=trans_dropout,
        )

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        tokens = _encode(self.head.transformer, self.embed(features), mask)
        return _attend(self.head.attention, self.head.myfc, tokens, mask)


class MONAIPyramidHead(MILModel):
    """MONAI's ``att_trans_pyramid``: a transformer on each level of a ResNet-50, fine joined to coarse.

    MONAI takes the levels from inside its ResNet-50. Here they are features: with ``in_features`` = 3840 the four
    levels' means (256 + 512 + 1024 + 2048), side by side, and the result is MONAI's; with any other encoder four
    linear maps stand in for the levels. The order does not matter.

    Args:
        in_features: width D of the features.
        n_outputs: number of logits.
        trans_blocks: transformer layers a level.
        trans_dropout: dropout in them.
    """

    def __init__(self, in_features: int, n_outputs: int, trans_blocks: int = 1, trans_dropout: float = 0.1) -> None:
        super().__init__(in_features, n_outputs)
        self.trans_blocks, self.trans_dropout = trans_blocks, float(trans_dropout)
        self.levels = (
            None
            if in_features == sum(PYRAMID_DIMS)
            else nn.ModuleList(nn.Linear(in_features, width) for width in PYRAMID_DIMS)
        )
        # Layer for layer as in MONAI, under its names; its own class would build a whole ResNet-50 beside them.
        first, second, third, last = (self._encoder(width) for width in (256, 256, 256, 2304))
        self.transformer = nn.ModuleList(
            [first, nn.Sequential(nn.Linear(768, 256), second), nn.Sequential(nn.Linear(1280, 256), third), last]
        )
        self.attention = nn.Sequential(nn.Linear(2304, 2048), nn.Tanh(), nn.Linear(2048, 1))
        self.myfc = nn.Linear(2304, n_outputs)

    def _encoder(self, width: int) -> nn.TransformerEncoder:
        layer = nn.TransformerEncoderLayer(d_model=width, nhead=8, dropout=self.trans_dropout)
        return nn.TransformerEncoder(layer, num_layers=self.trans_blocks, enable_nested_tensor=False)

    def forward_bag(self, features: Tensor, mask: Tensor) -> MILOutput:
        """See ``MILModel.forward_bag``."""
        if self.levels is None:
            parts = list(features.split(PYRAMID_DIMS, dim=-1))
        else:
            parts = [level(features) for level in self.levels]
        stages: Any = self.transformer
        tokens = _encode(stages[0], parts[0], mask)
        for stage, part in zip(list(stages)[1:3], parts[1:3]):
            tokens = _encode(stage[1], stage[0](torch.cat([tokens, part], dim=-1)), mask)
        tokens = _encode(stages[3], torch.cat([tokens, parts[3]], dim=-1), mask)
        return _attend(self.attention, self.myfc, tokens, mask)


def _encode(encoder: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Run torch's encoder layers (post-norm, ReLU) on (B, N, C) with padding masked.

    The layers are called part by part: torch's own shortcut for evaluation builds the whole N x N matrix, which for
    100,000 tiles no machine holds; scaled_dot_product_attention works in blocks.
    """
    keys = None if bool(mask.all()) else mask[:, None, None, :]
    for layer in encoder.layers:
        attention = layer.self_attn
        b, n, c = tokens.shape
        joined = nn.functional.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = joined.view(b, n, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
        rate = attention.dropout if attention.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=keys, dropout_p=rate)
        mixed = attention.out_proj(mixed.transpose(1, 2).reshape(b, n, c))
        tokens = layer.norm1(tokens + layer.dropout1(mixed))
        hidden = layer.linear2(layer.dropout(layer.activation(layer.linear1(tokens))))
        tokens = layer.norm2(tokens + layer.dropout2(hidden))
    return tokens


def _attend(score: nn.Module, classifier: nn.Module, tokens: Tensor, mask: Tensor) -> MILOutput:
    attention = masked_softmax(score(tokens).squeeze(-1), mask)
    logits = classifier(torch.bmm(attention.unsqueeze(1), tokens).squeeze(1))
    scores = classifier(tokens).masked_fill(~mask.unsqueeze(-1), 0.0)
    return MILOutput(logits, attention, scores, None, {})
