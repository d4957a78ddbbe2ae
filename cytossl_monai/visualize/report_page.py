"""The report of one slide: one HTML file that holds everything, readable without a network and on a phone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cytossl_monai.networks.describe import short_path
from cytossl_monai.utils.files import atomic_path, write_text
from cytossl_monai.visualize.gallery import GalleryTile
from cytossl_monai.visualize.heatmap import TileMap, colours, rgba
from cytossl_monai.visualize.overlay import blend
from cytossl_monai.visualize.page import NOTICE, jpeg_uri, json_data, png_uri, render

__all__ = ["NOTICE", "SlideReport", "kind_of", "write_preview", "write_report"]

_PREVIEW = 120
_PREVIEW_TILES = 4
_BINS = 20
_CHART = 600
_TALLEST = 96
_FILES = {
    "overlay": "picture with heat",
    "gallery": "gallery as a picture",
    "tiles": "table of tiles (Parquet)",
    "heatmap": "heatmap (pyramidal TIFF)",
    "nifti": "heatmap (NIfTI)",
    "geojson": "QuPath (GeoJSON)",
}


@dataclass(frozen=True)
class SlideReport:
    """What a report shows.

    Args:
        answer: content of prediction.json.
        thumbnail: (3, h, w) uint8, the whole slide.
        heat: the map of the evidence; None for a slide without cells.
        tiles: the leading tiles, best first.
        scores: (N,) suspicion of every tile.
        links: name to file beside the report.
    """

    answer: Mapping[str, Any]
    thumbnail: np.ndarray
    heat: TileMap | None = None
    tiles: Sequence[GalleryTile] = ()
    scores: np.ndarray | None = None
    links: Mapping[str, str] = field(default_factory=dict)


def kind_of(answer: Mapping[str, Any]) -> str:
    """What a slide's bag is made of: ``cell`` (fields centred on nuclei) or ``tile``."""
    return "cell" if answer["tiles"].get("instances") == "nuclei" else "tile"


def write_report(path: str | os.PathLike[str], report: SlideReport) -> Path:
    """Write the report, atomically.

    Args:
        path: the HTML file.
        report: what it shows.

    Returns:
        the path written.
    """
    answer = report.answer
    values: dict[str, Any] = {
        "title": f"{answer['slide_id']} - slide report",
        "answer": answer,
        "kind": kind_of(answer),
        "picture": jpeg_uri(report.thumbnail, 82),
        "made": _made(answer),
        "links": [(_FILES.get(key, key), file) for key, file in report.links.items()],
    }
    predicted = answer["label"] is not None
    if predicted:
        values |= _evidence(report)
    page = render("report.html", ("common.css", "report.css"), ("report.js",) if predicted else (), **values)
    write_text(path, page)
    return Path(path)


def _evidence(report: SlideReport) -> dict[str, Any]:
    """What a page shows of a slide with cells."""
    assert report.heat is not None
    tiles = [
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
    ]
    shown = [
        {**data, "picture": jpeg_uri(tile.image), "largest_um2": tile.largest_um2}
        for data, tile in zip(tiles, report.tiles)
    ]
    heat = report.heat
    bars = _bars(report.scores)
    return {
        "summary": _summary(report.answer),
        "ramp": ", ".join("rgb({} {} {})".format(*rgb) for rgb in colours(np.linspace(0, 1, 5))),
        "heat": png_uri(rgba(heat.values)),
        "tiles": shown,
        "side_um": report.tiles[0].size * report.answer["slide"]["mpp"] if report.tiles else 0,
        "bars": bars,
        "counts_in_words": ", ".join(f"{bar['count']} from {bar['low']:.2f}" for bar in bars if bar["count"]),
        "content": json_data(
            {"width": heat.width, "height": heat.height, "mpp": heat.mpp, "cell": heat.cell, "tiles": tiles}
        ),
    }


def _summary(answer: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    slide, tiles = answer["slide"], answer["tiles"]
    millimetres = [slide[side] * slide["mpp"] / 1000 for side in ("width", "height")]
    read = [f"{tiles['count']:,} {kind_of(answer)}s with {tiles['nuclei']:,} nuclei"]
    if tiles.get("unreadable"):
        read.append(f"{tiles['unreadable']:,} damaged tiles left out")
    if tiles.get("unreadable_fields"):
        read.append(f"{tiles['unreadable_fields']:,} fields around nuclei left out as damaged")
    size = "{:.1f} x {:.1f} mm".format(*millimetres)
    return [
        ("Slide", [size, f"{slide['width']:,} x {slide['height']:,} px at {slide['mpp']:.4g} µm/px"]),
        ("Read", read),
        ("Encoder", _encoder(answer["encoder"])),
        ("Classifier", _classifier(answer["classifier"]["members"])),
    ]


def _encoder(encoder: Mapping[str, Any]) -> list[str]:
    """What the encoder is: its name unless that is the usual file name, architecture, training, file."""
    lines = [] if encoder["name"] in ("model", "encoder") and encoder.get("architecture") else [encoder["name"]]
    lines += [encoder["architecture"]] if encoder.get("architecture") else []
    lines += [f"trained by {encoder['method']}"] if encoder.get("method") else []
    lines += [short_path(encoder["file"])] if encoder.get("file") else []
    return lines


def _classifier(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """Method and files of the classifier, or how many of them are averaged."""
    methods = " and ".join(sorted({member["method"] for member in members}))
    files = [short_path(member["file"]) for member in members if member.get("file")]
    return [methods if len(members) == 1 else f"{len(members)} folds of {methods}", *files]


def _bars(scores: np.ndarray | None) -> list[dict[str, float]]:
    """Histogram of the tiles' suspicion, on a root scale: a few suspicious tiles among thousands must show."""
    if scores is None or not len(scores):
        return []
    counts, edges = np.histogram(scores, bins=_BINS, range=(0, 1))
    step = _CHART / _BINS
    return [
        {
            "x": number * step,
            "width": step,
            "height": _TALLEST * float(np.sqrt(count / counts.max())),
            "count": int(count),
            "low": float(edge),
        }
        for number, (count, edge) in enumerate(zip(counts, edges))
    ]


def _made(answer: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    slide, encoder, classifier = answer["slide"], answer["encoder"], answer["classifier"]
    terms = []
    if encoder.get("license"):
        terms = [
            f"under {encoder['license']}" + (", not for commercial use" if encoder.get("commercial") is False else "")
        ]
    return [
        ("Slide file", [slide["path"]]),
        ("Slide fingerprint", [str(answer["made_from"]["slide"])]),
        ("Resolution", [f"{slide['mpp']:.4g} µm/px, from the {slide['mpp_source']}"]),
        ("Encoder", ["; ".join([*_encoder(encoder), encoder["hash"], *terms])]),
        ("Classifier", ["; ".join([*_classifier(classifier["members"]), classifier["hash"]])]),
        ("Software", [", ".join(f"{name} {version}" for name, version in answer["software"].items())]),
        ("Made", [answer["made"]]),
    ]


def _path(tile: GalleryTile) -> str:
    """The nuclei's outlines as an SVG path, in pixels of the tile."""
    rings = ["M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in ring[::2]) + "Z" for ring in tile.contours]
    return "".join(rings)


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
