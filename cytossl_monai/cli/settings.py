"""What a configuration lets a user set, read from the configuration itself: names, defaults and its own comments."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytossl_monai.utils.errors import InputError

__all__ = ["Setting", "check_names", "help_text", "read_settings"]

_NOT_SETTINGS = {"imports", "run", "initialize", "finalize", "bundle_root"}
_WIRING = "_comment_wiring"


@dataclass(frozen=True)
class Setting:
    """One top-level key of a configuration.

    Args:
        name: the key.
        default: its value as it is written.
        comment: the comment that stands before it; it may speak of several keys.
        nested: a component (`_target_`) or a section, which is set key by key (``--views#global_size 96``).
    """

    name: str
    default: Any
    comment: str = ""
    nested: bool = False


def read_settings(path: Path) -> tuple[str, list[Setting]]:
    """A configuration's first comment, and its settings in their order, up to the wiring.

    Args:
        path: JSON or YAML configuration of a bundle.

    Raises:
        InputError: when it is missing or malformed.
    """
    from cytossl_monai.engines.bundle import read_config_file  # MONAI takes seconds to import: --version goes without

    content = read_config_file(path)
    settings, comment, wired = [], "", False
    for key, value in content.items():
        if key.startswith("_comment"):
            comment, wired = str(value), wired or key == _WIRING
        elif key not in _NOT_SETTINGS and not key.startswith("_"):
            nested = isinstance(value, Mapping) and bool(value)
            if not wired and not (nested and "_target_" not in value):
                settings.append(Setting(key, value, comment, nested))
            comment = ""
    return str(content.get("_comment", content.get("_comment_paths", ""))), settings


def help_text(settings: Sequence[Setting], width: int = 100) -> str:
    """Settings with their defaults, under the comments that speak of them."""
    lines = []
    for setting in settings:
        if setting.comment:
            lines += ["", *textwrap.wrap(setting.comment, width, initial_indent="  ", subsequent_indent="  ")]
        default = setting.default.get("_target_", "") if setting.nested else json.dumps(setting.default)
        lines.append(f"    --{setting.name:<22} {textwrap.shorten(default, width - 28, placeholder=' ...')}".rstrip())
    return "\n".join(lines)


def check_names(given: Sequence[str], settings: Sequence[Setting], command: str) -> None:
    """Refuse a setting that the configuration has not; one within a section (``#``) is the bundle's to judge.

    Raises:
        InputError: it says which name is likely to be meant.
    """
    known = [setting.name for setting in settings]
    for name in given:
        if "#" in name or "::" in name or name in known:
            continue
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean --{near[0]}?" if near else f"cytossl {command} --help lists what there is"
        raise InputError(f"cytossl {command} has no setting --{name}; {hint}")
