"""Batch normalisation whose statistics cover the batch of all processes, on any backend (gloo and CPU too)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cytossl_monai.losses.gather import all_reduce_sum
from cytossl_monai.utils.distributed import is_distributed

__all__ = ["GatherBatchNorm", "synchronise_batchnorm"]


class GatherBatchNorm(_BatchNorm):
    """`nn.BatchNorm1d/2d/3d` in one process; in several, the same on the joined batch, gradients included.

    ``nn.SyncBatchNorm`` does this on CUDA only. Parameters, buffers and their names are those of ``nn.BatchNorm``, so a
    state dict fits both ways. Mean and variance are summed in two passes and in float32, which keeps the difference to
    the one-process result at rounding. Processes may hold batches of different sizes.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel.

        Args:
            input: (B, C, ...) float.

        Returns:
            same shape and dtype.

        Raises:
            ValueError: for fewer than two dimensions, or one value per channel while training.
        """
        batch_statistics = self.training or self.running_mean is None
        if not (batch_statistics and is_distributed()):
            return super().forward(input)
        self._check_input_dim(input)
        with torch.autocast(input.device.type, enabled=False):
            return self._joined(input).to(input.dtype)

    def _joined(self, input: Tensor) -> Tensor:
        values = input if input.dtype == torch.float64 else input.float()
        axes = [0, *range(2, values.ndim)]
        shape = [1, -1] + [1] * (values.ndim - 2)
        local_count = values.new_full((1,), values.numel() / values.shape[1])
        # The count rides on the first sum: two collectives per layer, not three.
        sums = all_reduce_sum(torch.cat([values.sum(axes), local_count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean.view(shape)
        variance = all_reduce_sum(centred.square().sum(axes)) / count
        self._track(mean.detach(), variance.detach(), count)
        normed = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normed = normed * self.weight.view(shape) + self.bias.view(shape)
        return normed

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not (self.training and self.track_running_stats):
            return
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)


def synchronise_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every ``nn.BatchNorm1d/2d/3d`` inside ``module`` by :class:`GatherBatchNorm`, sharing its parameters.

    Args:
        module: changed in place, except when it is itself a batch normalisation.

    Returns:
        ``module``, or its replacement. Names in the state dict stay what they were.
    """
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        twin = GatherBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        twin._parameters, twin._buffers = module._parameters, module._buffers
        twin.training = module.training
        return twin
    for name, child in module.named_children():
        replaced = synchronise_batchnorm(child)
        if replaced is not child:
            setattr(module, name, replaced)
    return module
