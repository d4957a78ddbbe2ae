"""Short names in bundle configurations: after ``$import cytossl_monai``, ``_target_: SRTransformer`` resolves.

MONAI looks for short names only in loaded modules whose own name begins with "monai". This file puts one such module
in place, with a small function a name that imports the real thing when it is called: importing the package stays cheap.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

__all__ = ["SHORT_NAMES", "register_short_names"]

MODULE = "monai_cytossl"

# Names that MONAI has itself (Encoder, resnet50) are not here: they would be ambiguous. Write their dotted path.
SHORT_NAMES = {
    "SRTransformer": "cytossl_monai.networks.nets.sr_transformer",
    "sr_vit_tiny": "cytossl_monai.networks.nets.sr_transformer",
    "sr_vit_small": "cytossl_monai.networks.nets.sr_transformer",
    "sr_vit_base": "cytossl_monai.networks.nets.sr_transformer",
    "vit_small": "cytossl_monai.networks.nets.sr_transformer",
    "to_sr_transformer": "cytossl_monai.networks.convert",
    "load_encoder": "cytossl_monai.networks.nets.encoder",
    "build_encoder": "cytossl_monai.networks.nets.encoder",
}


def _factory(name: str, module: str) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    make.__name__ = make.__qualname__ = name
    make.__module__ = MODULE  # MONAI lists only what a module says is its own
    make.__doc__ = f"See `{module}.{name}`."
    return make


def register_short_names() -> None:
    """Make `SHORT_NAMES` known to MONAI's component locator. Calling it again changes nothing."""
    shelf = types.ModuleType(MODULE, "Short names of cytossl_monai for bundle configurations.")
    for name, module in SHORT_NAMES.items():
        setattr(shelf, name, _factory(name, module))
    sys.modules.setdefault(MODULE, shelf)
