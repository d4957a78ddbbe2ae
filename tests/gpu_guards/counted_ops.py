"""What a batch asks of a device: each operation that would start a kernel or a copy, and the bytes that it touches.

A GPU is done with a small operation before the host has named the next, so the number of operations, not their size,
is what a small batch takes; a large one takes what memory gives. Both are counted on the pretended device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from pretend_device import PACKAGE, OnDevice, PretendDevice
from torch import Tensor
from torch.utils._pytree import tree_flatten

ONLY_MEMORY = ("aten.empty", "aten.new_empty", "aten.detach", "aten.alias", "aten.lift_fresh", "aten.set_")
OVERWRITING = ("aten.copy_", "aten.fill_", "aten.zero_")
PICKING = ("aten.index.", "aten.index_select", "aten.gather")
PUTTING = ("aten.index_put", "aten._index_put_impl", "aten.index_copy", "aten.scatter", "aten.index_add")


@dataclass
class Ops:
    """Operations by the line of this package that asks for them, ``"file:line function: operation"``.

    Attributes:
        count: how many.
        touched: bytes of what they read and write.
    """

    count: Counter[str] = field(default_factory=Counter)
    touched: Counter[str] = field(default_factory=Counter)

    def add(self, place: str, touched: int) -> None:
        self.count[place] += 1
        self.touched[place] += touched


class CountedDevice(PretendDevice):
    """A pretended device that counts operations.

    Attributes:
        device: those of the device, copies to and from it among them.
        host: those on tensors of the host, which cost the host time as well.
        looks: those that only look at memory in another way or ask for some, on either.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = Ops()
        self.host = Ops()
        self.looks = Ops()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(function, types, args, kwargs)
        given, made = _tensors((args, kwargs)), _tensors(result)
        name = str(function)
        place = f"{line()}: {name.removeprefix('aten.')}"
        if not _starts_something(function, given, made):
            self.looks.add(place, 0)
        elif any(isinstance(value, OnDevice) for value in given + made):
            self.device.add(place, _bytes(name, given, made))
        else:
            self.host.add(place, _bytes(name, given, made))
        return result

    def named(self) -> int:
        """How many calls of PyTorch the host makes in all."""
        return sum(ops.count.total() for ops in (self.device, self.host, self.looks))


def counted(work: Callable[[], Any]) -> CountedDevice:
    """What the second of two runs asks for: some things are made once, at the first."""
    for _ in range(2):
        with CountedDevice() as counter:
            work()
    return counter


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


def _memory(value: Tensor) -> int:
    return (value.inner if isinstance(value, OnDevice) else value).untyped_storage().data_ptr()


def _starts_something(function: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether it is more than another look at the same memory, or memory that nothing is written to."""
    if str(function).startswith(ONLY_MEMORY) or not any(value.numel() for value in given + made):
        return False
    if function._schema.is_mutable or not made:
        return True
    return not {_memory(value) for value in made} <= {_memory(value) for value in given}


def _size(value: Tensor) -> int:
    """Bytes, what is expanded counted once."""
    size = value.element_size()
    for length, stride in zip(value.shape, value.stride(), strict=True):
        size *= length if stride or not length else 1
    return size


def _bytes(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """What is read and what is written, each once."""
    if name.startswith(PICKING):  # of what is picked from only what is taken
        return 2 * sum(map(_size, made)) + sum(map(_size, given[1:]))
    if name.startswith(PUTTING):
        return sum(map(_size, given[1:])) + _size(given[-1])
    overwritten = name.startswith(OVERWRITING) or name.split(".")[-1].endswith("out")
    return sum(map(_size, made)) + sum(_size(one) for one in given if not (overwritten and one is made[0]))


def line() -> str:
    """``file:line function`` of the innermost frame of this package."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(PACKAGE)):
            return f"{name[len(str(PACKAGE)) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
