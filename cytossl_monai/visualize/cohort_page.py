"""The list of slides, most suspicious first: what a cytotechnologist opens in the morning."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cytossl_monai.utils.files import write_text
from cytossl_monai.visualize.page import render
from cytossl_monai.visualize.report_page import kind_of

__all__ = ["write_cohort_page"]


def write_cohort_page(
    path: str | os.PathLike[str],
    answers: Sequence[Mapping[str, Any]],
    failed: Mapping[str, str] | None = None,
    report: str = "report.html",
    preview: str = "preview.jpg",
) -> Path:
    """Write ``index.html``: slides sorted by suspicion, then those without cells and those that failed, with reasons.

    Args:
        path: the HTML file; the slides' folders, named by slide_id, lie beside it.
        answers: contents of the slides' prediction.json.
        failed: slide_id to reason.
        report: the report's name in a slide's folder.
        preview: the strip's name in a slide's folder.

    Returns:
        the path written.
    """
    path = Path(path)
    predicted = sorted((a for a in answers if a["label"] is not None), key=lambda a: (-a["suspicion"], a["slide_id"]))
    empty = sorted((a for a in answers if a["label"] is None), key=lambda a: str(a["slide_id"]))
    left_out = [
        {
            "name": answer["slide_id"],
            "link": _link(answer["slide_id"], report),
            "why": f"no cells found, no prediction. {answer['reason']}",
        }
        for answer in empty
    ]
    left_out += [{"name": name, "link": "", "why": f"failed. {why}"} for name, why in sorted((failed or {}).items())]
    page = render(
        "index.html",
        ("common.css", "index.css"),
        ("index.js",),
        "'self' file:",
        title="Slides by suspicion",
        today=datetime.date.today().isoformat(),
        count=len(predicted) + len(left_out),
        rows=[_row(answer, path.parent, report, preview) for answer in predicted],
        left_out=left_out,
    )
    write_text(path, page)
    return path


def _row(answer: Mapping[str, Any], folder: Path, report: str, preview: str) -> dict[str, Any]:
    name, tiles = str(answer["slide_id"]), answer["tiles"]
    return {
        "name": name,
        "patient": str(answer["patient_id"]),
        "label": str(answer["label"]),
        "suspicion": float(answer["suspicion"]),
        "size": f"{tiles['count']:,} {kind_of(answer)}s, {tiles['nuclei']:,} nuclei",
        "link": _link(name, report),
        "preview": _link(name, preview) if (folder / name / preview).is_file() else "",
    }


def _link(slide_id: str, name: str) -> str:
    return f"{quote(slide_id)}/{name}"
