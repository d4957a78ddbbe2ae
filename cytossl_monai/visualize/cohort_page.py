"""The list of slides, most suspicious first: what a cytotechnologist opens in the morning."""

from __future__ import annotations

import datetime
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cytossl_monai.utils.files import write_text
from cytossl_monai.visualize.report_page import NOTICE, asset, level_of, page

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
    rows = "".join(_row(answer, place, path.parent, report, preview) for place, answer in enumerate(predicted, 1))
    left = "".join(
        f'<li><a href="{_link(a["slide_id"], report)}">{_text(a["slide_id"])}</a>: no cells found, no prediction. '
        f"{_text(a['reason'])}</li>"
        for a in empty
    ) + "".join(f"<li><b>{_text(name)}</b>: failed. {_text(why)}</li>" for name, why in sorted((failed or {}).items()))
    tools = (
        '<div class="tools"><input id="filter" type="search" placeholder="Find a slide, patient or class" '
        'aria-label="Find a slide"><label class="small">order <select id="order"><option value="suspicion">by suspicion'
        '</option><option value="name">by name</option></select></label>'
        f'<span class="soft small" id="count">{len(predicted)} slides</span></div>'
        if predicted
        else ""
    )
    attention = (
        f'<section class="card left"><h2>Look at these yourself: {len(empty) + len(failed or {})}</h2>'
        f'<p class="soft small">They have no prediction.</p><ul class="small">{left}</ul></section>'
        if left
        else ""
    )
    today = datetime.date.today().isoformat()
    listed = f'<ol class="slides">{rows}</ol>' if rows else '<p class="card">No slide has a prediction.</p>'
    body = (
        f'<header class="page"><h1>{len(predicted) + len(empty) + len(failed or {})} slides</h1>'
        f'<p class="soft small" style="margin:4px 0 0">Most suspicious first &middot; {today}</p>'
        f'<p class="notice" role="note">{_text(NOTICE)}</p>{tools}</header>'
        f"<main>{listed}{attention}</main>"
        f'<footer class="page soft small"><p>{_text(NOTICE)}</p></footer>'
    )
    write_text(
        path, page("Slides by suspicion", body, ("common.css", "index.css"), [asset("index.js")], "'self' file:")
    )
    return path


def _row(answer: Mapping[str, Any], place: int, folder: Path, report: str, preview: str) -> str:
    name, suspicion = str(answer["slide_id"]), float(answer["suspicion"])
    patient = str(answer["patient_id"])
    who = f"patient {_text(patient)} &middot; " if patient != name else ""
    strip = f'<img src="{_link(name, preview)}" alt="" loading="lazy">' if (folder / name / preview).is_file() else ""
    searched = _text(f"{name} {patient} {answer['label']}".lower())
    return (
        f'<li data-suspicion="{suspicion:.6f}" data-name="{_text(name)}" data-text="{searched}">'
        f'<a href="{_link(name, report)}"><span class="place number">{place}</span>'
        f'<span><span class="name">{_text(name)}</span><br><span class="soft small">{who}'
        f"{answer['tiles']['count']:,} tiles, {answer['tiles']['nuclei']:,} nuclei</span></span>"
        f'<span class="answer"><span class="value"><b>{_text(answer["label"])}</b>'
        f'<span class="number">suspicion {suspicion:.2f}</span></span>'
        f'<span class="meter {level_of(suspicion)}" style="display:block"><i style="width:{suspicion:.1%}"></i></span>'
        f'</span><span class="strip">{strip}</span></a></li>'
    )


def _link(slide_id: str, name: str) -> str:
    return _text(f"{quote(slide_id)}/{name}")


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
