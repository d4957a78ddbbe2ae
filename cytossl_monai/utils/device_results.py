"""Results of a device, each waited for after the next was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

__all__ = ["one_behind"]


def one_behind(results: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Bring results of a device to the host, each waited for after the next was asked for.

    A GPU works behind the host. Whoever waits for each result at once lets it stand still while the next batch is
    copied and its kernels are named.

    Args:
        results: floating-point tensors; that they are made starts work on the device.

    Yields:
        float32 arrays of the same shapes, in order.
    """
    last: _Coming | None = None
    for result in results:
        coming = _Coming(result)
        if last is not None:
            yield last.wait()
        last = coming
    if last is not None:
        yield last.wait()


class _Coming:
    """A result on its way to the host: its copy is queued before any later work of the device."""

    def __init__(self, result: Tensor) -> None:
        # From CUDA into page-locked memory. A copy everywhere: an encoder may use the memory of its output again.
        self._values = result.float().to("cpu", non_blocking=result.is_cuda, copy=True)
        self._arrived = torch.cuda.Event() if result.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(result.device))

    def wait(self) -> np.ndarray:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.numpy()
