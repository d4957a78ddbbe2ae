"""Errors that a user can act on: one sentence that names the file, what is wrong and what to do."""

from __future__ import annotations

__all__ = ["CheckpointError", "FeatureError", "InputError", "SlideError", "TableError"]


class InputError(ValueError):
    """Something that the user gave is wrong. The message names it, says what is wrong and what to do."""


class SlideError(InputError):
    """A slide cannot be opened or read, or states no usable resolution."""


class TableError(InputError):
    """A slide table, datalist or tile index is malformed or contradicts itself."""


class FeatureError(InputError):
    """A feature file is missing, damaged, empty or made by another encoder."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or made for another architecture."""
