"""ResNet as a tile encoder, on MONAI's network."""

from __future__ import annotations

import os
from typing import Any

import torch
from monai.networks.nets.resnet import ResNet, ResNetBottleneck

from cytossl_monai.utils.errors import CheckpointError

__all__ = ["ResNetFeatures", "resnet50"]


class ResNetFeatures(ResNet):
    """MONAI's 2D ResNet-50 with the layout of torchvision's, giving the pooled features.

    Its parameters are torchvision's key for key, ``fc`` included or not.

    Args:
        in_channels: channels of the image.
        num_classes: 0 for features (B, 2048); above, a last linear layer ``fc`` as torchvision's and logits.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 0) -> None:
        super().__init__(
            ResNetBottleneck,
            [3, 4, 6, 3],
            [64, 128, 256, 512],
            spatial_dims=2,
            n_input_channels=in_channels,
            conv1_t_size=7,
            conv1_t_stride=2,
            no_max_pool=False,
            shortcut_type="B",
            num_classes=max(1, num_classes),
            feed_forward=num_classes > 0,
            bias_downsample=False,
        )
        self.config: dict[str, Any] = {"in_channels": in_channels, "num_classes": num_classes}
        self.embed_dim = num_classes or 2048


def resnet50(
    in_channels: int = 3, num_classes: int = 0, weights: str | os.PathLike[str] | None = None
) -> ResNetFeatures:
    """ResNet-50, the convolutional baseline.

    Args:
        in_channels: channels of the image.
        num_classes: 0 for features (B, 2048).
        weights: local file with a state dict of torchvision's ResNet-50 (ImageNet); nothing is downloaded.

    Raises:
        CheckpointError: where the file does not fit, with the names that do not.
    """
    network = ResNetFeatures(in_channels, num_classes)
    if weights is not None:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{weights}: no such file. Give a state dict of torchvision's ResNet-50.") from error
        own = network.state_dict()
        state = {name: value for name, value in state.items() if name in own or not name.startswith("fc.")}
        wrong = sorted(set(own) ^ set(state))
        wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
        if wrong:
            raise CheckpointError(f"{weights}: not a ResNet-50 of torchvision's layout; differs in {wrong[:5]}.")
        network.load_state_dict(state)
    return network
