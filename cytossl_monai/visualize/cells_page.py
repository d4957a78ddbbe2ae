"""A slide's cells on one page that opens without a network: a click on a cell sorts all others by likeness to it."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.utils.files import write_text
from cytossl_monai.visualize.page import json_data, render

__all__ = ["MAX_SIDE", "compact_features", "write_cells_page"]

_SHEET = 256  # cells of one picture
_ACROSS = 16
MAX_SIDE = 65500 // _ACROSS
"""Most pixels of a cell's side: a JPEG picture, which holds 16 of them in a row, is at most 65,500 pixels wide."""


def compact_features(features: np.ndarray, width: int = 48) -> np.ndarray:
    """Features as bytes for likeness in a browser: centred, of length one, their leading components.

    Args:
        features: (N, D) float.
        width: at most so many components.

    Returns:
        (N, min(width, N, D)) int8. Inner products of rows, divided by 127^2, are about the cosines of the centred
        features.
    """
    centred = features.astype(np.float64) - features.mean(axis=0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    reduced = centred @ axes[:width].T
    reduced /= np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), 1e-12)
    return np.round(reduced * 127).astype(np.int8)


def write_cells_page(
    path: str | os.PathLike[str],
    slide_id: str,
    pictures: np.ndarray,
    features: np.ndarray,
    fields: TileIndex,
    encoder_name: str = "",
) -> Path:
    """Write the page.

    Args:
        path: the HTML file.
        slide_id: of the slide.
        pictures: (N, 3, S, S) uint8, the fields.
        features: (N, D) their features.
        fields: their places in the slide.
        encoder_name: what made the features.

    Returns:
        the path written.
    """
    number, _, side, _ = pictures.shape
    sheets = [_sheet(pictures[start : start + _SHEET]) for start in range(0, number, _SHEET)]
    compact = compact_features(features)
    half = fields.table["size"].to_numpy() / 2
    places = np.round(fields.coords + half[:, None]).astype(int)
    content = {
        "side": side,
        "across": _ACROSS,
        "sheet": _SHEET,
        "width": compact.shape[1],
        "features": base64.b64encode(compact.tobytes()).decode(),
        "places": places.tolist(),
    }
    page = render(
        "cells.html",
        ("common.css", "cells.css"),
        ("cells.js",),
        title=f"{slide_id} - cells",
        slide_id=slide_id,
        side=side,
        sheets=[f"data:image/jpeg;base64,{base64.b64encode(sheet).decode()}" for sheet in sheets],
        number=number,
        micrometres=side * fields.mpp,
        encoder_name=encoder_name,
        content=json_data(content),
    )
    write_text(path, page)
    return Path(path)


def _sheet(pictures: np.ndarray) -> bytes:
    """Up to 256 pictures (n, 3, S, S) side by side, 16 a row, as one JPEG."""
    number, _, side, _ = pictures.shape
    rows = -(-number // _ACROSS)
    sheet = np.full((rows * side, _ACROSS * side, 3), 255, dtype=np.uint8)
    for place, picture in enumerate(pictures):
        top, left = place // _ACROSS * side, place % _ACROSS * side
        sheet[top : top + side, left : left + side] = picture.transpose(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "JPEG", quality=85)
    return stream.getvalue()
