"""Short names in bundle configurations: after ``$import cytossl_monai``, ``_target_: BatchedNCP`` resolves.

MONAI looks for short names only in loaded modules whose own name begins with "monai". This file puts one such module
in place, with a small function for each public name that imports the real thing when it is called: importing the
package stays cheap.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

__all__ = ["FACES", "register_short_names", "short_names"]

MODULE = "monai_cytossl"

FACES = (
    "data", "index", "transforms", "networks", "losses", "methods", "engines", "handlers", "metrics", "inference",
    "visualize", "utils",
)  # fmt: skip
"""The packages whose ``__all__`` is public."""

_AMBIGUOUS = {
    "Encoder",
    "ResNetFeatures",
    "resnet10",
    "resnet18",
    "resnet50",
}  # MONAI has these names itself: write their dotted path


def short_names() -> dict[str, str]:
    """Every public name that MONAI has not, with the package that exports it."""
    names: dict[str, str] = {}
    for face in FACES:
        package = f"cytossl_monai.{face}"
        names |= {name: package for name in importlib.import_module(package).__all__ if name not in _AMBIGUOUS}
    return names


def _factory(name: str, package: str) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(package), name)(*args, **kwargs)

    make.__name__ = make.__qualname__ = name
    make.__module__ = MODULE  # MONAI lists only what a module says is its own
    make.__doc__ = f"See `{package}.{name}`."
    return make


def register_short_names() -> None:
    """Make the short names known to MONAI's component locator. Calling it again changes nothing."""
    shelf = types.ModuleType(MODULE, "Short names of cytossl_monai for bundle configurations.")
    for name, package in short_names().items():
        setattr(shelf, name, _factory(name, package))
    sys.modules.setdefault(MODULE, shelf)
