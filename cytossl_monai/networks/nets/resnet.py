"""ResNets as tile encoders, on MONAI's network: 50 whole or cut as CLAM cuts it, its second version, and small ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from monai.networks.nets.resnet import ResNet, ResNetBlock, ResNetBottleneck
from torch import Tensor, nn

from cytossl_monai.networks.weight_files import fill_network, read_weights

__all__ = [
    "ResNetFeatures",
    "ResNetV2Features",
    "SmallResNet",
    "load_resnet_weights",
    "resnet10",
    "resnet18",
    "resnet50",
    "resnet50_v2",
]

_BLOCKS, _WIDTHS = [3, 4, 6, 3], [64, 128, 256, 512]
_LAYERS = {10: [1, 1, 1, 1], 18: [2, 2, 2, 2]}
NORMS = ("batch", "group")
_GROUP_WIDTH = 8  # channels that a group normalisation takes together


class ResNetFeatures(ResNet):
    """MONAI's 2D ResNet-50 with the layout of torchvision's, giving the pooled features.

    Its parameters are torchvision's key for key, ``fc`` included or not.

    Args:
        in_channels: channels of the image.
        num_classes: 0 for features (B, 2048); above, a last linear layer ``fc`` as torchvision's and logits.
        stages: 4 for the whole network; 3 leaves out ``layer4`` and gives features (B, 1024), as CLAM does.

    Raises:
        ValueError: for other stages, or a cut network with classes.
    """

    gives_vectors = True

    def __init__(self, in_channels: int = 3, num_classes: int = 0, stages: int = 4) -> None:
        if stages not in (3, 4) or (stages == 3 and num_classes):
            raise ValueError(f"stages must be 4, or 3 without classes; got {stages} with {num_classes} classes.")
        super().__init__(
            ResNetBottleneck,
            _BLOCKS,
            _WIDTHS,
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
        if stages == 3:
            self.layer4 = nn.Identity()
            self.config["stages"] = 3
        self.embed_dim = num_classes or (2048 if stages == 4 else 1024)


class _PreActivation(nn.Module):
    """``x + conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x)))))))))``, the shortcut drawn after the first ReLU."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.down = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False) if inputs != 4 * width else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.bn1(x).relu()
        shortcut = x if self.down is None else self.down(active)
        out = self.conv1(active)
        out = self.conv2(self.bn2(out).relu())
        return shortcut + self.conv3(self.bn3(out).relu())  # type: ignore[no-any-return]


class ResNetV2Features(nn.Module):
    """ResNet-50 of the second version (pre-activation) up to its third stage, giving (B, 1024).

    He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016; names as in the ONNX model zoo's weights:
    ``bn0`` over the image, ``conv0``, ``bn1``, ``stage1`` to ``stage3``, and ``post``, the norm that follows them.

    Args:
        in_channels: channels of the image.
    """

    gives_vectors = True
    embed_dim = 1024

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"in_channels": in_channels}
        self.bn0 = nn.BatchNorm2d(in_channels)
        self.conv0 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for stage, (blocks, width) in enumerate(zip(_BLOCKS[:3], _WIDTHS[:3]), start=1):
            layers = nn.Sequential()
            for block in range(blocks):
                layers.append(_PreActivation(inputs, width, 2 if stage > 1 and block == 0 else 1))
                inputs = 4 * width
            self.add_module(f"stage{stage}", layers)
        self.post = nn.BatchNorm2d(inputs)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W), normalised -> (B, 1024)."""
        x = self.pool(self.bn1(self.conv0(self.bn0(images))).relu())
        for stage in range(1, 4):
            x = self.get_submodule(f"stage{stage}")(x)
        return self.post(x).relu().mean(dim=(2, 3))  # type: ignore[no-any-return]


def load_resnet_weights(network: nn.Module, weights: str | os.PathLike[str] | Mapping[str, Any]) -> list[str]:
    """Fill a ResNet with a state dict of its layout; nothing is downloaded.

    Args:
        network: takes the weights in place.
        weights: a state dict, or a local file or folder with one. Layers behind those of the network (``layer4``,
            ``fc``) are not used.

    Returns:
        the entries that were not used.

    Raises:
        CheckpointError: where the file does not fit, with the names and shapes that differ.
    """
    where, state = read_weights(weights)
    kind = "a ResNet-50 v2" if isinstance(network, ResNetV2Features) else "a ResNet-50 of torchvision's layout"
    return fill_network(network, where, state, ("fc.", "layer4.", "stage4."), kind)


def resnet50(
    in_channels: int = 3,
    num_classes: int = 0,
    weights: str | os.PathLike[str] | None = None,
    stages: int = 4,
) -> ResNetFeatures:
    """ResNet-50, the convolutional baseline.

    Args:
        in_channels: channels of the image.
        num_classes: 0 for features (B, 2048).
        weights: local file with a state dict of torchvision's ResNet-50 (ImageNet); nothing is downloaded.
        stages: 4, or 3 for the 1,024 features of CLAM and TRIDENT.

    Raises:
        CheckpointError: where the file does not fit, with the names that do not.
    """
    network = ResNetFeatures(in_channels, num_classes, stages)
    if weights is not None:
        load_resnet_weights(network, weights)
    return network


def resnet50_v2(in_channels: int = 3, weights: str | os.PathLike[str] | None = None) -> ResNetV2Features:
    """ResNet-50 v2 up to its third stage, 1,024 features a tile.

    Args:
        in_channels: channels of the image.
        weights: local file with its state dict; nothing is downloaded.

    Raises:
        CheckpointError: where the file does not fit, with the names that do not.
    """
    network = ResNetV2Features(in_channels)
    if weights is not None:
        load_resnet_weights(network, weights)
    return network


class SmallResNet(ResNet):
    """MONAI's 2D ResNet with basic blocks, giving the pooled features.

    At depth 18, width 64 and batch normalisation its parameters are those of torchvision's ResNet-18, key for key,
    without ``fc``. Half as wide it costs a quarter.

    Papers: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; Wu and He, "Group Normalization", ECCV
    2018.

    Args:
        depth: 10 (one block a stage) or 18 (two).
        width: channels of the first stage, a multiple of 8; every later stage doubles them.
        norm: ``batch``, or ``group`` (groups of 8 channels: no image sees another while training, so accumulated and
            whole batches have the same gradient).
        in_channels: channels of the image.

    Attributes:
        embed_dim: width of the features, ``8 * width``.

    Raises:
        ValueError: for arguments outside what is described.
    """

    gives_vectors = True

    def __init__(self, depth: int = 18, width: int = 64, norm: str = "batch", in_channels: int = 3) -> None:
        if depth not in _LAYERS:
            raise ValueError(f"depth must be one of {', '.join(map(str, _LAYERS))}, got {depth}")
        if width < 8 or width % _GROUP_WIDTH:
            raise ValueError(f"width must be a multiple of {_GROUP_WIDTH} from 8 on, got {width}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        super().__init__(
            ResNetBlock,
            _LAYERS[depth],
            [width << stage for stage in range(4)],
            spatial_dims=2,
            n_input_channels=in_channels,
            conv1_t_size=7,
            conv1_t_stride=2,
            no_max_pool=False,
            shortcut_type="B",
            feed_forward=False,
            bias_downsample=False,
            norm="batch",
        )
        if norm == "group":
            _group_norms(self)
        self.config: dict[str, Any] = {"depth": depth, "width": width, "norm": norm, "in_channels": in_channels}
        self.embed_dim = 8 * width


def _group_norms(module: nn.Module) -> None:
    """Replace batch by group normalisation, in place; MONAI's argument takes one number of groups for all widths."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(child.num_features // _GROUP_WIDTH, child.num_features))
        else:
            _group_norms(child)


def resnet10(width: int = 32, norm: str = "batch", in_channels: int = 3) -> SmallResNet:
    """ResNet-10, by default half as wide as usual: 1.2 million parameters, features (B, 256)."""
    return SmallResNet(10, width, norm, in_channels)


def resnet18(width: int = 64, norm: str = "batch", in_channels: int = 3) -> SmallResNet:
    """ResNet-18: 11.2 million parameters, features (B, 512)."""
    return SmallResNet(18, width, norm, in_channels)
