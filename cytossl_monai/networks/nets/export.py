"""Encoders as TorchScript: what MONAI's ``ckpt_export`` writes to ``model.ts``."""

# No `from __future__ import annotations` here: TorchScript must be able to read the annotations.

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from cytossl_monai.networks.nets.pooling import image_size, pool_output
from cytossl_monai.networks.nets.sr_transformer import SRTransformer

__all__ = ["ScriptableEncoder", "learned_size"]

_USUAL = (224, 224)


def learned_size(encoder: Any) -> tuple[int, int]:
    """Rows and columns of the tiles that an encoder sees: those that it learned from, no larger than ``input_size``.

    Args:
        encoder: an `Encoder`. Its ``meta["tile_size"]`` says what it learned from (files of pretraining and cards do);
            where it does not, ``input_size`` counts; where there is neither, the network's own size; of networks
            without one 224.
    """
    network = encoder.network
    sides = [int(side) for side in (encoder.meta.get("tile_size"), encoder.input_size) if side]
    patches = network.patch_size if isinstance(network, SRTransformer) else (1, 1)
    if sides and not any(min(sides) % side for side in patches):
        return min(sides), min(sides)
    if isinstance(network, SRTransformer):
        grid, patch = network.patch_embedding.grid, network.patch_embedding.patch_size
        return int(grid[0] * patch[0]), int(grid[1] * patch[1])
    if not hasattr(network, "image_size") and not hasattr(network, "patch_embedding"):
        return _USUAL  # convolutions alone, which take any size
    height, width = image_size(network)
    return int(height), int(width)


class ScriptableEncoder(nn.Module):
    """An encoder that ``torch.jit.script`` can compile: its network traced, for batches of any size.

    The layout of tokens is Python that TorchScript cannot read, so the network is traced, for tiles of the size that it
    learned from (`learned_size`); others are refused, larger ones brought down where the encoder does so.
    ``encoder_hash`` is the encoder's own, so that features are told apart.

    Args:
        encoder: an `Encoder`; it is put into evaluation mode.

    Raises:
        ValueError: for a network that drops background: how many tokens it computes depends on the tile, and a trace
            would keep the number of the tile that it was made with.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        network = encoder.network
        if isinstance(network, SRTransformer) and network.drop_background is not None:
            raise ValueError(
                "an encoder with drop_background cannot be exported: its work depends on the tile; build it with "
                "drop_background=None, which takes the same weights"
            )
        self.height, self.width = learned_size(encoder)
        self.channels = int(encoder.mean.shape[1])
        self.shrinks: bool = encoder.input_size is not None
        self.encoder_hash: str = encoder.hash
        encoder.eval()
        example = torch.rand(2, self.channels, self.height, self.width, device=encoder.mean.device)
        with torch.no_grad(), warnings.catch_warnings():
            # The tracer warns of every shape that is read; that batches of other sizes come out right is tested.
            warnings.simplefilter("ignore")
            traceable = encoder if isinstance(network, SRTransformer) else _Plain(encoder)
            self.traced = torch.jit.trace(traceable, example, check_trace=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float in [0, 1], to (B, D); H and W as it was traced for, or larger (`input_size`)."""
        if self.shrinks and image.dim() == 4 and min(image.shape[2], image.shape[3]) > self.height:
            image = image.float() / 255 if image.dtype == torch.uint8 else image
            size = [self.height, self.width]
            image = torch.nn.functional.interpolate(image, size=size, mode="bilinear", antialias=True).clamp(0.0, 1.0)
        if image.dim() != 4 or image.shape[1:] != [self.channels, self.height, self.width]:
            raise ValueError(
                f"Images must be (B, {self.channels}, {self.height}, {self.width}); got {list(image.shape)}."
            )
        if image.dtype == torch.uint8:
            image = image.float() / 255
        return self.traced(image)


class _Plain(nn.Module):
    """The same encoder without its properties for patches, which a network without patches refuses to the tracer."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.network, self.pool = encoder.network, encoder.pool
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", encoder.mean)
        self.register_buffer("std", encoder.std)

    def forward(self, images: Tensor) -> Tensor:
        return pool_output(self.network((images - self.mean) / self.std), self.pool, self.network)
