"""A device that is not there: tensors that say they lie on a device and are computed on the CPU.

Code that runs under `PretendDevice` takes the way it takes on a GPU (``tensor.device.type`` is not ``"cpu"``), and what
a CPU forgives is counted or refused:

- *waits*: the host reads a value, copies to itself, or must know how large a result is (boolean indices, ``nonzero``,
  ``unique``, ``bincount``), and a copy to the device that waits for it, for ``non_blocking`` was not said;
- *copies*: those to the device that do not wait;
- an operation on a tensor of the device and one of the host is an error, as on a GPU.

The device is called ``meta``, the one name that PyTorch lets anyone use without a driver.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
PACKAGE = Path(__file__).parents[2] / "cytossl_monai"

READS = ("aten._local_scalar_dense", "aten.equal", "aten.is_nonzero")
SIZES = ("aten.nonzero", "aten.masked_select", "aten.unique", "aten._unique", "aten.bincount", "aten.repeat_interleave")
INDEXING = ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_", "aten._unsafe_index")


class OnDevice(Tensor):
    """A tensor of the pretended device; ``inner`` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        out.inner = inner
        return out  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    def as_subclass(self, cls: type[Tensor]) -> OnDevice:  # type: ignore[override]
        """Itself: it has no metadata of another class."""
        return self

    def tolist(self) -> Any:
        """By the host, as PyTorch does it for other devices; it refuses other classes."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendDevice().__torch_dispatch__(function, types, args, kwargs)  # outside of one nothing is counted


class PretendDevice(TorchDispatchMode):
    """Runs what is within as if `OnDevice` tensors lay on a GPU.

    Attributes:
        waits: what the host waits for, by ``"file:function: operation"`` of this package.
        copies: the copies to the device that it does not wait for, likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        # The last number that became a tensor: copied from there, it was `tensor[0] = number`, over which CUDA waits.
        self._numbers: list[OnDevice] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = str(function).rsplit(".", 1)[0]
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        own = [value for value in tensors if isinstance(value, OnDevice)]
        host = [value for value in tensors if not isinstance(value, OnDevice)]
        to_device = bool(own)
        if "device" in kwargs and kwargs["device"] is not None:
            to_device = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        if name in ("aten._to_copy", "aten.copy_"):
            into = name == "aten.copy_"
            source, target = (args[1], isinstance(args[0], OnDevice)) if into else (args[0], to_device)
            if into and any(source is number for number in self._numbers):
                self.waits[f"{where()}: number set"] += 1
            self._count_copy(isinstance(source, OnDevice), target, bool(kwargs.get("non_blocking")))
        elif own:
            self._check(name, args, own, host)
        if not own and not to_device:
            return function(*args, **kwargs)
        args, kwargs = tree_map(lambda value: value.inner if isinstance(value, OnDevice) else value, (args, kwargs))
        result = function(*args, **kwargs)
        if not to_device:
            # What is copied to the host must not share memory with the device.
            return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, result)
        known = {id(value.inner): value for value in own}
        if name == "aten.scalar_tensor":
            self._numbers = [OnDevice(result)]
            return self._numbers[0]
        return tree_map(lambda value: self._wrapped(value, known), result)

    @staticmethod
    def _wrapped(value: Any, known: dict[int, OnDevice]) -> Any:
        """A result of the device: itself where an operation writes in place."""
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else OnDevice(value)

    def _count_copy(self, from_device: bool, to_device: bool, non_blocking: bool) -> None:
        if from_device and not to_device:
            self.waits[f"{where()}: copy to the host"] += 1
        elif to_device and not from_device:
            counted = self.copies if non_blocking else self.waits
            counted[f"{where()}: copy to the device"] += 1

    def _check(self, name: str, args: Any, own: list[OnDevice], host: list[Tensor]) -> None:
        indices: list[Any] = []
        if name in INDEXING:
            indices = [value for value in args[1] if isinstance(value, Tensor)]
            for index in indices:
                if index.dtype in (torch.bool, torch.uint8):
                    self.waits[f"{where()}: boolean index"] += 1
                elif not isinstance(index, OnDevice):
                    self.waits[f"{where()}: index on the host"] += 1
        elif name.startswith(READS):
            self.waits[f"{where()}: value read"] += 1
        elif name.startswith(SIZES):
            self.waits[f"{where()}: {name.removeprefix('aten.').strip('_')}"] += 1
        strangers = [value for value in host if value.ndim and not any(value is index for index in indices)]
        if strangers:
            raise RuntimeError(f"{name} at {where()} mixes tensors of the device and of the host")


def where() -> str:
    """``file:function`` of the innermost frame of this package; a gradient has none."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def move(module: nn.Module) -> nn.Module:
    """Put a module's weights and buffers on the pretended device, in place; shared ones stay shared."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    own: Tensor = OnDevice(tensor.detach().clone())
                    if isinstance(tensor, nn.Parameter):
                        own = nn.Parameter(own, tensor.requires_grad)
                    moved[id(tensor)] = (tensor, own)
                tensors[name] = moved[id(tensor)][1]  # type: ignore[index]
    return module


class DeviceGenerator(torch.Generator):
    """A generator that says it lies on the pretended device; its numbers are those of the CPU's."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The pretended one."""
        return DEVICE
