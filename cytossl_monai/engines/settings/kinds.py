"""What a setting may be: a count, a number, a choice, a switch, a path, a device, a list of these."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_NO_LIMIT = 2**31 - 1
"""A limit from here on is one of the program, not of sense: users are not told."""

__all__ = ["Choice", "Count", "Device", "Items", "Kind", "Map", "Number", "PathText", "Switch", "Text"]


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Args:
        null: None is allowed too.
        reader: what reads it, in words, for a setting that must not be passed over in silence: a run in which nothing
            does ends where it has a value. "": such a setting is named where the command line gives it.
    """

    null: bool = False
    reader: str = field(default="", kw_only=True)

    def read(self, value: Any) -> Any:
        """The value as the run takes it, from what a command line or a configuration file made of it.

        Raises:
            ValueError: when it is none of this kind; says what it must be, not what it is.
        """
        if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null") and self.null):
            if self.null:
                return None
            raise ValueError("a value, not null")
        return self._read(value)

    def _read(self, value: Any) -> Any:
        return value


def _number(value: Any) -> float:
    """A number, also one that YAML leaves as text (``1e-3`` has no point); no boolean, no NaN, no infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _range(low: float, high: float, above: bool = False) -> str:
    words = []
    if math.isfinite(low):
        words.append(f"above {_plain(low)}" if above else f"at least {_plain(low)}")
    if high < _NO_LIMIT:
        words.append(f"at most {_plain(high)}")
    return ", ".join(words)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


@dataclass(frozen=True)
class Count(Kind):
    """A whole number.

    Args:
        low: the least.
        high: the most.
        words: texts that are allowed too.
    """

    low: int = 0
    high: int = _NO_LIMIT
    words: tuple[str, ...] = ()

    def _read(self, value: Any) -> Any:
        if isinstance(value, str) and value in self.words:
            return value
        try:
            number = _number(value)
        except ValueError:
            number = math.nan
        if not self.low <= number <= self.high or number != int(number):
            words = "".join(f", or {word!r}" for word in self.words)
            raise ValueError(f"a whole number, {_range(self.low, self.high)}{words}")
        return int(number)


@dataclass(frozen=True)
class Number(Kind):
    """A number.

    Args:
        low: the least.
        high: the most.
        above: ``low`` itself is too little.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def _read(self, value: Any) -> Any:
        try:
            number = _number(value)
        except ValueError:
            number = math.nan
        if not self.low <= number <= self.high or (self.above and number == self.low):
            raise ValueError(f"a number, {_range(self.low, self.high, self.above)}")
        return value if isinstance(value, (int, float)) else number


@dataclass(frozen=True)
class Switch(Kind):
    """True or false, also as text in any case (a command line's ``false`` is text, and text counts as true)."""

    def _read(self, value: Any) -> Any:
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if word in ("true", "yes", "on", "1"):
            return True
        if word in ("false", "no", "off", "0"):
            return False
        raise ValueError("true or false")


@dataclass(frozen=True)
class Choice(Kind):
    """One of some words.

    Args:
        among: the words.
    """

    among: tuple[str, ...] = ()

    def _read(self, value: Any) -> Any:
        if value not in self.among:
            raise ValueError(f"one of {', '.join(self.among)}")
        return value


@dataclass(frozen=True)
class Text(Kind):
    """A name; a number that a command line made of it is text again."""

    def _read(self, value: Any) -> Any:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise ValueError("text")


@dataclass(frozen=True)
class PathText(Text):
    """A path.

    Args:
        output: a folder that the run writes to: checked before it begins.
        must_exist: a file or folder that the run reads.
        many: a list of paths too.
    """

    output: bool = False
    must_exist: bool = False
    many: bool = False

    def _read(self, value: Any) -> Any:
        if self.many and isinstance(value, (list, tuple)):
            return [self._read(each) for each in value]
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        try:
            text = super()._read(value)
        except ValueError:
            raise ValueError("a path" + (", or a list of paths" if self.many else "")) from None
        if not text.strip() or "\0" in text:
            raise ValueError("a path, not empty")
        if self.must_exist and not Path(text).exists():
            raise ValueError("a path that exists")
        return text


@dataclass(frozen=True)
class Device(Kind):
    """A device that PyTorch has on this machine."""

    def _read(self, value: Any) -> Any:
        try:
            device = torch.device(value)
        except (RuntimeError, TypeError):
            raise ValueError("a device such as cpu, cuda or cuda:1") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("a device of this machine: PyTorch finds no CUDA here, give cpu")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"a device of this machine, which has {torch.cuda.device_count()} CUDA devices")
        return device if isinstance(value, torch.device) else value


@dataclass(frozen=True)
class Items(Kind):
    """A list of values of one kind.

    Args:
        of: their kind.
        count: how many there must be; None: any number.
        alone: a value that is no list is a list of one.
    """

    of: Kind = Text()
    count: int | None = None
    alone: bool = False

    def _read(self, value: Any) -> Any:
        if self.alone and not isinstance(value, (list, tuple)):
            value = [value]
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            raise ValueError("a list")
        if self.count is not None and len(value) != self.count:
            raise ValueError(f"a list of {self.count}")
        try:
            return [self.of.read(each) for each in value]
        except ValueError as error:
            raise ValueError(f"a list of which each is {error}") from None


@dataclass(frozen=True)
class Map(Kind):
    """A dictionary: settings by name."""

    def _read(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError("a dictionary such as {'epochs': 30}")
        return value
