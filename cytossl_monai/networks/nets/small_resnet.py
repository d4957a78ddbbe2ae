"""ResNet-10 and ResNet-18 of any width: convolutional encoders that two CPU cores train."""

from __future__ import annotations

from typing import Any

from monai.networks.nets.resnet import ResNet, ResNetBlock
from torch import nn

__all__ = ["SmallResNet", "resnet10", "resnet18"]

_LAYERS = {10: [1, 1, 1, 1], 18: [2, 2, 2, 2]}
NORMS = ("batch", "group")
_GROUP_WIDTH = 8  # channels that a group normalisation takes together


class SmallResNet(ResNet):
    """MONAI's 2D ResNet with basic blocks, giving the pooled features.

    At depth 18, width 64 and batch normalisation its parameters are those of torchvision's ResNet-18, key for key, without
    ``fc``. Half as wide it costs a quarter.

    Papers: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; Wu and He, "Group Normalization", ECCV
    2018.

    Args:
        depth: 10 (one block a stage) or 18 (two).
        width: channels of the first stage, a multiple of 8; every later stage doubles them.
        norm: ``batch``, or ``group`` (groups of 8 channels: no image sees another while training, so accumulated and whole
            batches have the same gradient).
        in_channels: channels of the image.

    Attributes:
        embed_dim: width of the features, ``8 * width``.

    Raises:
        ValueError: for arguments outside what is described.
    """

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
