"""What the texts of a configuration refer to, and what a run of it reaches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from monai.bundle.reference_resolver import ReferenceResolver

__all__ = ["ABSENT", "heads", "part", "reached", "references", "strings", "without_meta"]

ABSENT = object()
"""What stands for an id that is not there."""

_STEPS = ("initialize", "run", "finalize")
"""What ``monai.bundle run`` evaluates; all else is made when one of these asks for it."""


def strings(config: Any) -> Iterator[str]:
    """All texts in a configuration or a part of one."""
    if isinstance(config, Mapping):
        for value in config.values():
            yield from strings(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from strings(value)
    elif isinstance(config, str):
        yield config


def references(config: Any) -> set[str]:
    """All ids that the texts of a configuration, or of a part of one, refer to, but for its comments."""
    return {
        reference
        for text in strings(without_meta(config) if isinstance(config, Mapping) else config)
        for reference in ReferenceResolver.match_refs_pattern(ReferenceResolver.normalize_id(text))
    }


def heads(ids: Iterable[str]) -> set[str]:
    """The top-level ids of references."""
    return {one.split("::")[0] for one in ids}


def without_meta(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without its metadata and comments."""
    return {key: value for key, value in config.items() if key != "_meta_" and not str(key).startswith("_comment")}


def part(config: Any, one: str) -> Any:
    """What stands under an id of a configuration (``train::dataset``, ``initialize::0``), or ``ABSENT``.

    As ``parser[one]``, but for an id that is not there: MONAI then looks for the most alike of all names, a millisecond
    each time, and ``one in parser`` throws that away.
    """
    for name in one.replace("#", "::").split("::"):
        try:
            config = config[int(name)] if isinstance(config, list) else config[name]
        except (KeyError, IndexError, TypeError, ValueError):
            return ABSENT
    return config


def reached(config: Mapping[str, Any]) -> set[str]:
    """The ids that a run of a configuration asks for, directly or through others (``train::dataset``)."""
    ids: set[str] = set()
    todo = references({step: config.get(step) for step in _STEPS})
    while todo:
        one = todo.pop()
        ids.add(one)
        todo |= references(part(config, one)) - ids
    return ids
