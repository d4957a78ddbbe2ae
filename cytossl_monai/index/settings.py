"""What the index looks for: its settings, and their check where they come by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cytossl_monai.index.low_power import InkRules
from cytossl_monai.utils.errors import SettingError

__all__ = ["IndexSettings"]


@dataclass(frozen=True)
class IndexSettings:
    """Which tiles to look for and which to keep. Densities are optical densities, log10 of glass over pixel.

    Args:
        tile_size: side of a tile in pixels at ``mpp``.
        mpp: micrometres per pixel that tiles are to be read at.
        search_mpp: micrometres per pixel of the look at low power that proposes tiles.
        nuclei_mpp: micrometres per pixel at which nuclei are counted.
        foreground_density: a pixel denser than this against the slide's own glass is foreground.
        nuclear_density: a pixel denser than this in red and in green may belong to a nucleus.
        min_dark_um2: a tile is proposed when this much of it may belong to nuclei, square micrometres.
        min_nucleus_um2: least area of a nucleus, square micrometres.
        min_contrast: density by which a nucleus exceeds its surroundings.
        min_edge: density per micrometre at a nucleus' steepest edge.
        max_elongation: length over width of a nucleus; threads have more.
        min_nuclei: a tile is kept when it holds at least so many nuclei.
        min_sharpness: tiles less sharp than this are left out; the slide's sharp tiles have about 1.
        max_ink_fraction: tiles with more than this share under a pen mark are left out.
        max_unreadable: a slide fails when more than this share of the tiles worth looking at cannot be decoded soundly;
            up to it they are left out and counted.
        ink: what is a pen mark.
    """

    tile_size: int = 224
    mpp: float = 0.5
    search_mpp: float = 4.0
    nuclei_mpp: float = 1.0
    foreground_density: float = 0.04
    nuclear_density: float = 0.1
    min_dark_um2: float = 12.0
    min_nucleus_um2: float = 10.0
    min_contrast: float = 0.06
    min_edge: float = 0.05
    max_elongation: float = 4.0
    min_nuclei: int = 1
    min_sharpness: float = 0.35
    max_ink_fraction: float = 0.1
    max_unreadable: float = 0.05
    ink: InkRules = field(default_factory=InkRules)

    def __post_init__(self) -> None:
        if self.tile_size < 16:
            raise ValueError(f"tile_size must be at least 16 pixels, not {self.tile_size}")
        for name in ("mpp", "search_mpp", "nuclei_mpp"):
            if not 0.05 <= getattr(self, name) <= 20:
                raise ValueError(f"{name} must be 0.05 to 20 micrometres per pixel, not {getattr(self, name)}")
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable must be a share, 0 to 1, not {self.max_unreadable}")
        if not self.min_contrast > 0:
            raise ValueError(f"min_contrast must be above 0, not {self.min_contrast}: all of a tile would be nuclei")
        if self.min_nuclei < 0:
            raise ValueError(f"min_nuclei must be 0 or more, not {self.min_nuclei}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> IndexSettings:
        """Settings by name, as a configuration gives them; ``ink`` may be a mapping of `InkRules`' fields.

        Raises:
            SettingError: for a name that there is not, or a value that is no number or out of its range.
        """
        chosen = {name: value for name, value in settings.items() if name != "ink"}
        ink = settings.get("ink", {})
        _check_numbers(cls, chosen, "")
        if isinstance(ink, Mapping):
            _check_numbers(InkRules, ink, "ink#")
            ink = InkRules(**ink)
        elif not isinstance(ink, InkRules):
            raise SettingError(f"setting ink must be a dictionary such as {{'green': 0.25}}; it is {ink!r}")
        try:
            return cls(**chosen, ink=ink)
        except ValueError as error:
            raise SettingError(f"setting {error}") from error


def _check_numbers(kind: Any, settings: Mapping[str, Any], prefix: str) -> None:
    known = [field.name for field in fields(kind)]
    for name, value in settings.items():
        if name not in known:
            raise SettingError(f"unknown setting {prefix}{name} of the index; there are {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise SettingError(f"setting {prefix}{name} of the index must be a number; it is {value!r}")
