"""One slide as the slide table describes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["SlideRecord"]


@dataclass(frozen=True)
class SlideRecord:
    """One slide of the table.

    Args:
        slide_id: unique name; the index, the features and the predictions are filed under it.
        path: the slide, absolute.
        label: class of the slide as text; None when it is not known.
        patient_id: whose slide it is. Slides of one patient never lie on both sides of a split.
        fold: number of the fold or None when folds are still to be drawn.
        mpp: micrometres per pixel at level 0, when the file does not say or says it wrong.
        extra: the table's other columns, as text (datalist: as they are); a datalist's section under ``"split"``.
        local: a copy of the slide on a faster disk, to read the pixels from (`SlideCache`).
    """

    slide_id: str
    path: Path
    label: str | None
    patient_id: str
    fold: int | None = None
    mpp: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    local: Path | None = None
