"""What resolution a file states, read with its unit, for both axes, or why what it states cannot be used."""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["Resolution", "openslide_resolution", "tiff_resolution"]

ANISOTROPY = 0.02
"""Relative difference between width and height of a pixel from which on pixels are not taken for square."""

_TAG_UNIT_UM = {2: 25_400.0, 3: 10_000.0, 4: 1_000.0, 5: 1.0}
_UNIT_UM = {
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0,
    "micrometre": 1.0, "nm": 1e-3, "pm": 1e-6, "å": 1e-4, "in": 25_400.0, "inch": 25_400.0,
}  # fmt: skip
_NUMBER = r"[-+]?(?:\d+[.,]?\d*|[.,]\d+)(?:[eE][-+]?\d+)?"


@dataclass(frozen=True)
class Resolution:
    """Micrometres per pixel of level 0 as a file states them.

    Args:
        x: width of a pixel; None where nothing is stated.
        y: height of a pixel.
        problem: why what the file says cannot be used, to follow "the file states"; None where there is none.
    """

    x: float | None = None
    y: float | None = None
    problem: str | None = None

    @property
    def mpp(self) -> float | None:
        """Side of a square pixel, micrometres; None where none is stated, or pixels are not square."""
        if self.problem is not None or self.complaint() is not None or self.x is None or self.y is None:
            return None
        return math.sqrt(self.x * self.y)

    def complaint(self, least: float = 0.0, most: float = math.inf) -> str | None:
        """What is wrong with it, to follow the file's name; None where it can be used.

        Args:
            least: micrometres per pixel below which it is taken for a mistake.
            most: the same above.
        """
        if self.problem is not None:
            return f"states {self.problem}"
        if self.x is None or self.y is None or not (self.x > 0 and self.y > 0):
            return "states no resolution"
        if not (math.isfinite(self.x) and math.isfinite(self.y)) or not least <= math.sqrt(self.x * self.y) <= most:
            return f"states an absurd resolution ({math.sqrt(self.x) * math.sqrt(self.y):.4g} um per pixel)"
        if abs(self.x / self.y - 1) > ANISOTROPY:
            return (
                f"states pixels that are not square ({self.x:.4g} x {self.y:.4g} um): resample it to square pixels, or"
            )
        return None


def _number(text: Any) -> float | None:
    """A number with a decimal point or comma, None where the text is none."""
    try:
        return float(str(text).strip().replace(",", "."))
    except ValueError:
        return None


def tiff_resolution(page: Any, ome: str | None = None) -> Resolution:
    """The resolution of a TIFF page: OME-XML, Aperio's MPP, ImageJ's unit, or the resolution tags.

    Args:
        page: a tifffile ``TiffPage``, the one of full resolution.
        ome: the file's OME-XML, where it has one.

    Returns:
        what is stated. A numerator or denominator of 0, and a tag without a unit, state nothing.
    """
    description = str(page.description or "")
    if ome or "<OME" in description[:2000]:
        return _ome_resolution(ome or description, int(page.imagewidth), int(page.imagelength))
    aperio = re.search(rf"\bMPP\s*=\s*({_NUMBER})", description)
    if aperio:
        value = _number(aperio.group(1))
        return Resolution(value, value)
    tags = [page.tags.get(name) for name in ("XResolution", "YResolution")]
    unit_tag = page.tags.get("ResolutionUnit")
    unit = 2 if unit_tag is None else int(unit_tag.value)
    scale = _TAG_UNIT_UM.get(unit)
    if description.startswith("ImageJ="):
        named = re.search(r"^unit=(.+)$", description, re.MULTILINE)
        scale = _unit(named.group(1)) if named else scale
    if unit_tag is None or scale is None or any(tag is None for tag in tags):
        return Resolution()
    sides = []
    for tag in tags:
        assert tag is not None
        above, below = tag.value if isinstance(tag.value, tuple) else (tag.value, 1)
        if not above or not below:
            return Resolution()
        sides.append(scale * below / above)
    return Resolution(*sides)


def _unit(name: str) -> float | None:
    text = name.strip().replace("\\u00B5", "µ").replace("μ", "u").replace("µ", "u")
    return _UNIT_UM.get(text.lower() if len(text) > 2 else text) or _UNIT_UM.get(text.lower())


def _ome_resolution(xml: str, width: int, height: int) -> Resolution:
    """Of the image in the OME-XML that has this size; read by pattern, so that no entity of the XML is expanded."""
    sizes = [
        {key: html.unescape(value) for key, value in re.findall(r'(\w+)\s*=\s*"([^"]*)"', tag)}
        for tag in re.findall(r"<(?:\w+:)?Pixels\b([^>]*)>", xml)
    ]
    same = [s for s in sizes if s.get("SizeX") == str(width) and s.get("SizeY") == str(height)]
    for size in same or sizes[:1]:
        sides: list[float | None] = []
        for axis in ("X", "Y"):
            stated = size.get(f"PhysicalSize{axis}")
            if stated is None:
                sides.append(None)
                continue
            name = size.get(f"PhysicalSize{axis}Unit", "µm")
            scale, value = _unit(name), _number(stated)
            if scale is None:
                return Resolution(problem=f"its resolution in {name[:40]!r}, which is no unit of length")
            sides.append(None if value is None else value * scale)
        # Files that state one axis mean both.
        return Resolution(sides[0] or sides[1], sides[1] or sides[0])
    return Resolution()


def openslide_resolution(properties: Any) -> Resolution:
    """The resolution that OpenSlide found in a vendor's format.

    Args:
        properties: of the ``OpenSlide``.
    """
    x, y = (_number(properties.get(f"openslide.mpp-{axis}", "")) for axis in "xy")
    return Resolution(x or y, y or x)
