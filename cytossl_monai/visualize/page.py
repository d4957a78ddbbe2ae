"""HTML pages that hold all they show: style, script and pictures are inside, and nothing may be fetched."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

__all__ = ["NOTICE", "jpeg_uri", "json_data", "level_of", "png_uri", "render"]

NOTICE = "Research use only. Not a medical device. Nothing here is a diagnosis; a person must look at the slide."
MID, HIGH = 1 / 3, 2 / 3
"""Where the colour of a suspicion changes. Colours only: no decision is taken at them."""


def asset(name: str) -> str:
    """Text of a file that this package brings along."""
    return resources.files("cytossl_monai.visualize").joinpath("assets", name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["level"] = level_of
    environment.globals["notice"] = NOTICE
    return environment


def render(template: str, styles: Sequence[str], scripts: Sequence[str], images: str = "", **values: Any) -> str:
    """A whole page from a template of ``assets``; every value is escaped unless it is ``Markup``.

    Args:
        template: file name; it extends ``page.html``.
        styles: names of the style sheets that go in.
        scripts: names of the scripts that go in.
        images: further sources that pictures may come from, as in a Content-Security-Policy.
        values: what the template shows.

    Raises:
        jinja2.UndefinedError: for a value that the template names and nobody gave.
    """
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup("".join(asset(name) for name in styles)),
            scripts=[Markup(asset(name)) for name in scripts],
            images=images,
            **values,
        )
    )


def level_of(suspicion: float) -> str:
    """``low``, ``mid`` or ``high``, for the colour."""
    return "high" if suspicion >= HIGH else "mid" if suspicion >= MID else "low"


def json_data(content: Any) -> Markup:
    """JSON that may stand within a ``script`` element: nothing in it ends the element."""
    return Markup(json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def jpeg_uri(image: np.ndarray, quality: int = 86) -> str:
    """A picture (3, H, W) uint8 as the address of a JPEG that holds it."""
    stream = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    picture.save(stream, "JPEG", quality=quality, optimize=True, progressive=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def png_uri(pixels: np.ndarray) -> str:
    """Pixels (H, W, 4) uint8 as the address of a PNG that holds them."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
