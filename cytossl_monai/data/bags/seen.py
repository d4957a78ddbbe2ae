"""Which slides a classifier has seen, kept without their names, so that it is not judged on them unawares."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from cytossl_monai.data.bags.items import Item

__all__ = ["seen_digests", "seen_items"]


def seen_digests(learned: Sequence[Item], chosen: Sequence[Item] = ()) -> dict[str, Any]:
    """Digests of slides and patients, plain data for a classifier's file.

    A salt of the file's own keeps them from being looked up in a table of names; who has the names can try them all.

    Args:
        learned: items that weights were learned from.
        chosen: items that decided when training stopped, and that probabilities were calibrated on.

    Returns:
        ``salt``, and ``learned`` and ``chosen``: sorted digests.
    """
    salt = secrets.token_hex(8)
    return {
        "salt": salt,
        "learned": sorted({digest for item in learned for digest in _digests(item, salt)}),
        "chosen": sorted({digest for item in chosen for digest in _digests(item, salt)}),
    }


def seen_items(items: Sequence[Item], seen: Mapping[str, Any] | None, part: str = "learned") -> list[Item]:
    """Those of some items that are slides, or of patients, of ``seen_digests``.

    Args:
        items: items with ``slide_id`` and ``patient_id``.
        seen: what ``seen_digests`` gave; None (files of before it was kept): nothing is known.
        part: ``learned`` or ``chosen``.
    """
    if not seen:
        return []
    known = set(seen[part])
    return [item for item in items if known & _digests(item, seen["salt"])]


def _digests(item: Item, salt: str) -> set[str]:
    # Both: a table in which patients were named later still has the slides.
    names = (f"slide {item['slide_id']}", f"patient {item['patient_id']}")
    return {hashlib.blake2b(f"{salt} {name}".encode(), digest_size=8).hexdigest() for name in names}
