"""Cells of CSV files that can be written, and that a spreadsheet shows and does not run."""

from __future__ import annotations

import re
from typing import Any

from cytossl_monai.utils.files import encodable

__all__ = ["plain_cell", "stored_cell"]

_RUNS = re.compile(r"\s*[=+\-@\t\r]")
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*|\s*[+-]?(nan|inf)\s*", re.IGNORECASE)
_MARKED = re.compile(r"'(?=\s*[=+\-@\t\r])")


def plain_cell(value: Any) -> Any:
    """A value as it is safe in a CSV file that somebody opens with Excel or LibreOffice.

    Text that begins with ``=``, ``+``, ``-``, ``@``, a tab or a carriage return is run as a formula there; an
    apostrophe in front makes it text (OWASP, CSV injection). Numbers stay, and so does text that is one. What cannot be
    written as UTF-8, such as a file name from an old share, is written out (see `encodable`).

    Args:
        value: anything that goes into a cell.

    Returns:
        the text with an apostrophe in front where it needs one, else the value itself.
    """
    if isinstance(value, str):
        value = encodable(value)
    if isinstance(value, str) and _RUNS.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def stored_cell(text: str) -> str:
    """The text that `plain_cell` was given: its apostrophe is taken off again."""
    return _MARKED.sub("", text, count=1) if text.startswith("'") else text
