"""The report of one slide: one HTML file that holds everything, readable without a network and on a phone."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cytossl_monai.utils.files import atomic_path, write_text
from cytossl_monai.visualize.gallery import GalleryTile
from cytossl_monai.visualize.heatmap import TileMap, colours, rgba
from cytossl_monai.visualize.overlay import blend

__all__ = ["NOTICE", "SlideReport", "asset", "level_of", "page", "write_preview", "write_report"]

NOTICE = "Research use only. Not a medical device. Nothing here is a diagnosis; a person must look at the slide."
MID, HIGH = 1 / 3, 2 / 3
"""Where the colour of a suspicion changes. Colours only: no decision is taken at them."""

_POLICY = (
    "default-src 'none'; img-src data:{more}; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
_PREVIEW = 120
_PREVIEW_TILES = 4
_BINS = 20


@dataclass(frozen=True)
class SlideReport:
    """What a report shows.

    Args:
        told: content of prediction.json.
        thumbnail: (3, h, w) uint8, the whole slide.
        heat: the map of the evidence; None for a slide without cells.
        tiles: the leading tiles, best first.
        scores: (N,) suspicion of every tile.
        links: name to file beside the report.
    """

    told: Mapping[str, Any]
    thumbnail: np.ndarray
    heat: TileMap | None = None
    tiles: Sequence[GalleryTile] = ()
    scores: np.ndarray | None = None
    links: Mapping[str, str] = field(default_factory=dict)


def write_report(path: str | os.PathLike[str], report: SlideReport) -> Path:
    """Write the report, atomically.

    Args:
        path: the HTML file.
        report: what it shows.

    Returns:
        the path written.
    """
    told = report.told
    predicted = told["label"] is not None
    parts = [_head(told)]
    if predicted:
        parts += [_verdict(told), _viewer(report), _gallery(report), _distribution(report)]
    else:
        parts += [_no_cells(told), _still(report)]
    parts.append(_made(told, report.links))
    body = f'{parts[0]}<main>{"".join(parts[1:])}</main><footer class="page soft small"><p>{_text(NOTICE)}</p></footer>'
    scripts = [asset("report.js")] if predicted else ["document.documentElement.dataset.ready = 'true';"]
    if predicted:
        body += f'<script type="application/json" id="content">{_content(report)}</script>'
    write_text(path, page(f"{told['slide_id']} - slide report", body, ("common.css", "report.css"), scripts))
    return Path(path)


def page(title: str, body: str, styles: Sequence[str], scripts: Sequence[str], images: str = "") -> str:
    """A whole HTML page with its styles and scripts inside, and a policy that forbids fetching anything else.

    Args:
        title: of the window.
        body: HTML.
        styles: names of assets.
        scripts: JavaScript.
        images: further sources that pictures may come from, as in a Content-Security-Policy.
    """
    css = "".join(asset(name) for name in styles)
    code = "".join(f"<script>{script}</script>" for script in scripts)
    policy = _POLICY.format(more=f" {images}" if images else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{_text(title)}</title><style>{css}</style></head><body>{body}{code}</body></html>\n"
    )


def asset(name: str) -> str:
    """Text of a file that this package brings along."""
    return resources.files("cytossl_monai.visualize").joinpath("assets", name).read_text(encoding="utf-8")


def level_of(suspicion: float) -> str:
    """``low``, ``mid`` or ``high``, for the colour."""
    return "high" if suspicion >= HIGH else "mid" if suspicion >= MID else "low"


# -- parts ----------------------------------------------------------------------------------------------------------


def _head(told: Mapping[str, Any]) -> str:
    patient = told["patient_id"]
    who = f" &middot; patient {_text(patient)}" if patient != told["slide_id"] else ""
    return (
        f'<header class="page"><h1>{_text(told["slide_id"])}</h1>'
        f'<p class="soft small" style="margin:4px 0 0">Slide report{who} &middot; {_text(told["made"][:10])}</p>'
        f'<p class="notice" role="note">{_text(NOTICE)}</p></header>'
    )


def _verdict(told: Mapping[str, Any]) -> str:
    suspicion = told["suspicion"]
    bars = "".join(
        f'<span>{_text(name)}</span><span class="meter"><i style="width:{p:.1%}"></i></span>'
        f'<span class="number">{p:.3f}</span>'
        for name, p in told["probabilities"].items()
    )
    spread = told["suspicion_spread"]
    folds = f' <span class="soft">&plusmn; {spread:.2f} between the folds</span>' if spread > 0 else ""
    calibrated = (
        "Probabilities were calibrated on slides that the classifier was not trained on."
        if told["calibrated"]
        else "Probabilities are not calibrated: they rank slides, they are no frequencies."
    )
    slide, tiles = told["slide"], told["tiles"]
    unreadable = tiles.get("unreadable", 0)
    damaged = f"<br>{unreadable:,} damaged tiles left out" if unreadable else ""
    size = f"{slide['width'] * slide['mpp'] / 1000:.1f} x {slide['height'] * slide['mpp'] / 1000:.1f} mm"
    pixels = f"{slide['width']:,} x {slide['height']:,} px at {slide['mpp']:.4g} µm/px"
    return (
        '<section class="card verdict"><div>'
        '<p class="soft small" style="margin:0">The classifier\'s most probable class</p>'
        f'<p class="label">{_text(told["label"])}</p>'
        f'<p style="margin:12px 0 4px">Suspicion <b class="number">{suspicion:.2f}</b>{folds}</p>'
        f'<div class="meter {level_of(suspicion)}"><i style="width:{suspicion:.1%}"></i></div>'
        f'<div class="bars small">{bars}</div></div><div>'
        '<dl class="facts small">'
        f"<dt>Slide</dt><dd>{size}<br>{pixels}</dd>"
        f"<dt>Read</dt><dd>{tiles['count']:,} tiles with {tiles['nuclei']:,} nuclei{damaged}</dd>"
        f"<dt>Encoder</dt><dd>{_text(told['encoder']['name'])}</dd>"
        f"<dt>Classifier</dt><dd>{_text(_methods(told))}</dd></dl>"
        f'<p class="soft small" style="margin:12px 0 0">{calibrated} Suspicion is {_meaning(told)}.</p>'
        "</div></section>"
    )


def _licence(encoder: Mapping[str, Any]) -> str:
    """The encoder's licence as the end of a line, where it is known."""
    terms = ", not for commercial use" if encoder.get("commercial") is False else ""
    return f"; under {encoder['license']}{terms}" if encoder.get("license") else ""


def _meaning(told: Mapping[str, Any]) -> str:
    if told["negative_class"] is None:
        return "the largest probability of a finding"
    return f"the probability of every class but &ldquo;{_text(told['negative_class'])}&rdquo;"


def _methods(told: Mapping[str, Any]) -> str:
    names = [member["method"] for member in told["classifier"]["members"]]
    return names[0] if len(names) == 1 else f"{len(names)} folds of {names[0]}"


def _viewer(report: SlideReport) -> str:
    assert report.heat is not None
    stops = ", ".join("rgb({} {} {})".format(*rgb) for rgb in colours(np.linspace(0, 1, 5)))
    picture = _uri(_jpeg(report.thumbnail, 82), "jpeg")
    heat = _uri(_png(rgba(report.heat.values)), "png")
    return (
        '<section class="card"><h2>Where the evidence lies</h2><div class="tools">'
        '<span class="zoom"><button id="zoom-out" aria-label="Zoom out">&minus;</button> '
        '<button id="zoom-in" aria-label="Zoom in">+</button> <button id="zoom-fit">Whole slide</button></span>'
        '<button id="toggle-heat" aria-pressed="true">Heat</button>'
        '<label class="small">strength <input id="strength" type="range" min="10" max="100" value="75"></label>'
        '<button id="toggle-marks" aria-pressed="true">Frames</button>'
        '<button id="toggle-nuclei" aria-pressed="true">Nuclei</button>'
        f'<span class="ramp small soft">little <i style="background:linear-gradient(90deg, {stops})"></i> much</span>'
        '</div><div class="viewer"><canvas id="slide" tabindex="0" role="img" aria-label="The slide with its evidence; '
        'arrow keys move, plus and minus zoom, h hides the heat"></canvas></div>'
        '<p class="where small soft" id="where">Drag to move, wheel or pinch to zoom. Colour is attention times '
        "suspicion of the tile; glass and tiles without a nucleus are not coloured.</p>"
        "<noscript><p>The zoomable picture needs JavaScript. overlay.png, beside this file, shows the same.</p>"
        "</noscript>"
        f'<img id="picture" src="{picture}" alt="" hidden><img id="heat" src="{heat}" alt="" hidden></section>'
    )


def _gallery(report: SlideReport) -> str:
    figures = []
    for rank, tile in enumerate(report.tiles, 1):
        pixels = tile.image.shape[-1]
        nucleus = f"nucleus {tile.largest_um2:.0f} µm²" if tile.largest_um2 is not None else "no nucleus outlined"
        figures.append(
            f'<figure><button class="tile" id="cell-{rank}" aria-label="Show tile {rank} on the slide">'
            f'<img src="{_uri(_jpeg(tile.image, 86), "jpeg")}" alt="Tile {rank}">'
            f'<svg viewBox="0 0 {pixels} {pixels}" aria-hidden="true"><path d="{_path(tile)}"/></svg>'
            f'<span class="rank">{rank}</span></button>'
            f'<figcaption class="number">suspicion <b>{tile.score:.2f}</b><br><span class="soft">'
            f"attention {tile.attention:.1f}x<br>{nucleus}</span></figcaption></figure>"
        )
    side = report.tiles[0].size * report.told["slide"]["mpp"] if report.tiles else 0
    return (
        '<section class="card"><h2>The cells that decided</h2><p class="soft small" style="margin:-6px 0 14px">'
        f"The {len(figures)} leading tiles, strongest first; each is {side:.0f} µm wide. Attention 1x is the slide's "
        "mean; the nucleus is the tile's largest. Choose one to see it in its place.</p>"
        f'<div class="gallery" id="gallery">{"".join(figures)}</div></section>'
    )


def _distribution(report: SlideReport) -> str:
    """Histogram of the tiles' suspicion, on a root scale: a few suspicious tiles among thousands must show."""
    if report.scores is None or not len(report.scores):
        return ""
    counts, _ = np.histogram(report.scores, bins=_BINS, range=(0, 1))
    heights = np.sqrt(counts / counts.max())
    width, height, foot = 600, 120, 34
    step = width / _BINS
    bars = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{height - h * 96:.1f}" width="{step - 2:.1f}" height="{h * 96:.1f}"/>'
        + (
            f'<text x="{(i + 0.5) * step:.1f}" y="{height - h * 96 - 4:.1f}" text-anchor="middle">{n}</text>'
            if n
            else ""
        )
        for i, (n, h) in enumerate(zip(counts, heights))
    )
    ticks = "".join(
        f'<text x="{v * width:.0f}" y="{height + 16}" text-anchor="{a}">{v:g}</text>'
        for v, a in ((0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end"))
    )
    return (
        '<section class="card"><h2>Suspicion of the single tiles</h2>'
        f'<svg class="chart" viewBox="0 0 {width} {height + foot}" role="img" aria-label="Histogram of tile suspicion">'
        f'{bars}<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="#c5cdd6"/>{ticks}</svg>'
        '<p class="soft small" style="margin:0">Number of tiles by suspicion, each tile judged alone.</p></section>'
    )


def _no_cells(told: Mapping[str, Any]) -> str:
    return (
        '<section class="card"><p class="empty">No cells found</p>'
        "<p>No prediction was made. This says nothing about the patient: the slide must be looked at, or scanned again."
        f'</p><p class="soft small" style="margin-bottom:0">{_text(told["reason"])}</p></section>'
    )


def _still(report: SlideReport) -> str:
    return (
        '<section class="card"><h2>The slide</h2>'
        f'<img src="{_uri(_jpeg(report.thumbnail, 82), "jpeg")}" alt="The slide" style="max-width:100%;height:auto">'
        "</section>"
    )


def _made(told: Mapping[str, Any], links: Mapping[str, str]) -> str:
    names = {
        "overlay": "picture with heat",
        "gallery": "gallery as a picture",
        "tiles": "table of tiles (Parquet)",
        "heatmap": "heatmap (pyramidal TIFF)",
        "nifti": "heatmap (NIfTI)",
        "geojson": "QuPath (GeoJSON)",
    }
    files = " &middot; ".join(f'<a href="{_text(file)}">{names.get(key, key)}</a>' for key, file in links.items())
    rows = [
        ("Slide file", told["slide"]["path"]),
        ("Slide fingerprint", told["made_from"]["slide"]),
        ("Resolution", f"{told['slide']['mpp']:.4g} µm/px, from the {told['slide']['mpp_source']}"),
        ("Encoder", f"{told['encoder']['name']}, {told['encoder']['hash']}{_licence(told['encoder'])}"),
        ("Classifier", f"{told['classifier']['hash']}, {_methods(told)}"),
        ("Software", ", ".join(f"{name} {version}" for name, version in told["software"].items())),
        ("Made", told["made"]),
    ]
    facts = "".join(f"<dt>{_text(name)}</dt><dd>{_text(str(value))}</dd>" for name, value in rows)
    beside = f'<p class="small" style="margin-bottom:0">Beside this file: {files}</p>' if files else ""
    return f'<section class="card"><h2>Made from</h2><dl class="facts small">{facts}</dl>{beside}</section>'


# -- data -----------------------------------------------------------------------------------------------------------


def _content(report: SlideReport) -> str:
    assert report.heat is not None
    content = {
        "width": report.heat.width,
        "height": report.heat.height,
        "mpp": report.heat.mpp,
        "cell": report.heat.cell,
        "tiles": [
            {
                "x": tile.x,
                "y": tile.y,
                "size": tile.size,
                "pixels": tile.image.shape[-1],
                "score": round(tile.score, 4),
                "attention": round(tile.attention, 3),
                "outline": _path(tile),
            }
            for tile in report.tiles
        ],
    }
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _path(tile: GalleryTile) -> str:
    """The nuclei's outlines as an SVG path, in pixels of the tile."""
    rings = ["M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in ring[::2]) + "Z" for ring in tile.contours]
    return "".join(rings)


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(image: np.ndarray, quality: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(
        stream, "JPEG", quality=quality, optimize=True, progressive=True
    )
    return stream.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def write_preview(path: str | os.PathLike[str], report: SlideReport) -> Path:
    """Write the strip that stands for the slide in the list of slides: the slide, then its leading tiles.

    Args:
        path: the JPEG file.
        report: what to show.

    Returns:
        the path written.
    """
    side, gap = _PREVIEW, 6
    strip = Image.new("RGB", (side + _PREVIEW_TILES * (side + gap), side), "white")
    height, width = report.thumbnail.shape[1:]
    shrink = side / max(height, width)
    small = max(1, round(width * shrink)), max(1, round(height * shrink))
    slide = (
        blend(report.thumbnail, report.heat)
        if report.heat is not None
        else Image.fromarray(np.ascontiguousarray(report.thumbnail.transpose(1, 2, 0)))
    )
    slide = slide.resize(small, Image.Resampling.BOX)
    strip.paste(slide, ((side - small[0]) // 2, (side - small[1]) // 2))
    for i, tile in enumerate(report.tiles[:_PREVIEW_TILES]):
        cell = Image.fromarray(np.ascontiguousarray(tile.image.transpose(1, 2, 0)))
        strip.paste(cell.resize((side, side), Image.Resampling.LANCZOS), (side + gap + i * (side + gap), 0))
    with atomic_path(path) as partial:
        strip.save(partial, format="JPEG", quality=84)
    return Path(path)
