"""A part of the slides for each of many machines: which, by a hash that stays, and a report of its own."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cytossl_monai.utils.errors import ShardError

__all__ = ["ALL", "SHARDS_VARIABLE", "Shard", "choose_shard", "shard_reports"]

Item = TypeVar("Item")
logger = logging.getLogger(__name__)

SHARDS_VARIABLE = "CYTOSSL_SHARDS"
"""How many shards there are, where the scheduler tells a job its number only (Kubernetes)."""

_REPORT = re.compile(r"\.(\d+)-of-(\d+)\.csv$")


@dataclass(frozen=True)
class Shard:
    """Shard ``index`` of ``count``; slides are dealt by a hash of their slide_id.

    The hash is the same on every machine and in every release, and does not depend on the table's other slides: a
    table that grows moves no slide.

    Args:
        index: 1 to ``count``.
        count: number of shards.

    Raises:
        ShardError: when there is no such shard.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ShardError(
                f"shard {self.index}/{self.count} does not exist: the first of n shards is 1/n, the last n/n"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"3/8"`` is the third of eight.

        Raises:
            ShardError: for any other form, and for a shard that does not exist.
        """
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", str(text))
        if match is None:
            raise ShardError(f"shard {text!r} is not of the form i/n; the third of eight is 3/8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def __contains__(self, slide_id: str) -> bool:
        return self.of(slide_id, self.count) == self.index

    @staticmethod
    def of(slide_id: str, count: int) -> int:
        """Number of the shard, 1 to ``count``, that a slide belongs to."""
        digest = hashlib.blake2b(slide_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % count + 1

    def select(self, items: Iterable[Item], slide_id: Callable[[Item], str]) -> list[Item]:
        """The items of this shard, in their order.

        Args:
            items: records of a slide table, or whatever else has an id.
            slide_id: gives an item's id.
        """
        return [item for item in items if slide_id(item) in self]

    def report_path(self, path: str | os.PathLike[str]) -> Path:
        """``report.csv`` becomes ``report.3-of-8.csv``; with one shard it stays."""
        path = Path(path)
        return path if self.count == 1 else path.with_name(f"{path.stem}.{self.index}-of-{self.count}{path.suffix}")

    def claim(self, path: str | os.PathLike[str]) -> Path:
        """The report's path, once it is sure that the folder holds no reports of another number of shards.

        Args:
            path: the report of an unsharded run.

        Raises:
            ShardError: when there are reports of another number of shards: some slides would be in two, others in none.
        """
        for number, (_, other) in shard_reports(path).items():
            if number[1] != self.count and self.count > 1:
                raise ShardError(
                    f"{other} is of {number[1]} shards and this run is shard {self}; use one number of shards in a "
                    "folder, or merge and remove the old reports"
                )
        return self.report_path(path)


ALL = Shard(1, 1)
"""All slides, the shard of a run that is the only one."""


def shard_reports(path: str | os.PathLike[str]) -> dict[tuple[int, int], tuple[Shard, Path]]:
    """The reports of shards that lie beside ``report.csv``, by number and count of the shard.

    Args:
        path: the report of an unsharded run; it need not exist.
    """
    path = Path(path)
    reports: dict[tuple[int, int], tuple[Shard, Path]] = {}
    for member in sorted(path.parent.glob(f"{path.stem}.*-of-*{path.suffix}")):
        match = _REPORT.search(member.name)
        if match is not None and member.name == f"{path.stem}{match[0]}":
            shard = Shard(int(match[1]), int(match[2]))
            reports[shard.index, shard.count] = (shard, member)
    return reports


def choose_shard(shard: str | None = None, environment: Mapping[str, str] | None = None) -> Shard:
    """The shard that a run is to do: as told, else as the scheduler's array job says, else everything (1/1).

    Read are ``SLURM_ARRAY_TASK_ID`` (with ``_COUNT``, ``_MIN`` and ``_STEP``), ``AWS_BATCH_JOB_ARRAY_INDEX`` (with
    ``AWS_BATCH_JOB_ARRAY_SIZE``) and ``JOB_COMPLETION_INDEX`` (an indexed Job of Kubernetes, with ``CYTOSSL_SHARDS``,
    which also stands in where another count is missing). ``shard: "1/1"`` does all slides inside an array job.

    Args:
        shard: ``"i/n"``, or None to look at the environment.
        environment: variables to look at; None takes the process's own.

    Raises:
        ShardError: for a shard that is malformed or does not exist, or a number without a count.
    """
    if shard is not None:
        return Shard.parse(shard)
    variables = os.environ if environment is None else environment

    def number(name: str, default: int | None = None) -> int | None:
        text = variables.get(name, "").strip()
        if not text:
            return default
        if not text.isdigit():
            raise ShardError(f"environment variable {name} is {text!r}, not a number; give --shard i/n")
        return int(text)

    shards = number(SHARDS_VARIABLE)
    choice: Shard | None = None
    source = ""
    if (index := number("SLURM_ARRAY_TASK_ID")) is not None:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0) or 0, number("SLURM_ARRAY_TASK_STEP", 1) or 1
        source, count = "SLURM_ARRAY_TASK_ID", number("SLURM_ARRAY_TASK_COUNT", shards)
        choice = _shard(source, (index - first) // step + 1, count)
    elif (index := number("AWS_BATCH_JOB_ARRAY_INDEX")) is not None:
        source, count = "AWS_BATCH_JOB_ARRAY_INDEX", number("AWS_BATCH_JOB_ARRAY_SIZE", shards)
        choice = _shard(source, index + 1, count)
    elif (index := number("JOB_COMPLETION_INDEX")) is not None:
        source = "JOB_COMPLETION_INDEX"
        choice = _shard(source, index + 1, shards)
    if choice is None:
        return ALL
    logger.warning("%s: this run does shard %s (--shard 1/1 does all slides)", source, choice)
    return choice


def _shard(source: str, index: int, count: int | None) -> Shard:
    if count is None:
        raise ShardError(
            f"{source} says that this is job {index} of an array, and nothing says of how many; set "
            f"{SHARDS_VARIABLE} to the number of jobs, or give --shard i/n (1/1 does all slides)"
        )
    return Shard(index, count)
