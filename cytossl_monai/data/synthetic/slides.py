"""Synthetic cytology slides: labelled whole-slide images for a demo, for tests and for a first look at the program.

They look like a Papanicolaou-stained liquid-based preparation at low and at high power, and they hold what the task
needs: the label of a slide shows in nuclei (size, density, chromatin, outline of a few cells) and not in its colour,
which varies from slide to slide as laboratories do. They are no substitute for real slides.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from cytossl_monai.data.slides.write import write_pyramid
from cytossl_monai.data.synthetic.cells import LESION_CLASSES, CellStamp, Stain, render_cell
from cytossl_monai.utils.files import atomic_path
from cytossl_monai.utils.parallel import run_parallel

__all__ = ["PlacedCell", "SyntheticSettings", "make_slide", "make_slides"]

VERSION = 1
"""Changes with every change of the pixels, so that slides of an older generator are made again."""

LABELS = ("negative", "positive")

_BAND = 512
_BANK = {"superficial": 10, "intermediate": 14, "parabasal": 8, "leukocyte": 12, "debris": 6}


@dataclass(frozen=True)
class SyntheticSettings:
    """What a slide is made of.

    Args:
        size: side of the slide, level-0 pixels.
        mpp: micrometres per pixel.
        density: mean number of epithelial cells per square millimetre of the preparation.
        burden: share of dysplastic cells among the epithelial cells of a positive slide.
        leukocytes: mean number of leukocytes for one epithelial cell; varies widely from slide to slide.
        stain_jitter: spread of the stain from slide to slide, a share of 1.
        blur: share of the cells that lie out of focus.
    """

    size: int = 4096
    mpp: float = 0.25
    density: float = 260.0
    burden: float = 0.06
    leukocytes: float = 0.6
    stain_jitter: float = 0.15
    blur: float = 0.12

    def __post_init__(self) -> None:
        if self.size < 512:
            raise ValueError(f"size must be at least 512 pixels, not {self.size}")
        if not 0.1 <= self.mpp <= 2:
            raise ValueError(f"mpp must be 0.1 to 2 micrometres per pixel, not {self.mpp}")
        for name in ("burden", "blur", "stain_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, not {getattr(self, name)}")
        if self.density < 0 or self.leukocytes < 0:
            raise ValueError("density and leukocytes must be 0 or more")


@dataclass(frozen=True)
class PlacedCell:
    """One line of the truth table: where a cell lies, level-0 pixels, and its nucleus (0 wide where it has none)."""

    x: int
    y: int
    w: int
    h: int
    kind: str
    nucleus_x: int
    nucleus_y: int
    nucleus_w: int
    nucleus_h: int


def make_slides(
    output_dir: str | os.PathLike[str],
    n_slides: int = 12,
    size: int = 4096,
    seed: int = 0,
    num_workers: int = 0,
    slides_per_patient: int = 1,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Make labelled slides; those that are there already, whole and of the same settings, are left as they are.

    Every second slide is ``positive``, the others are ``negative``. What is written:

    - ``slide_0000.tif`` ...: tiled pyramidal JPEG TIFF with its resolution;
    - ``slides.csv``: ``slide_id,path,label,lesion,patient_id,n_cells,n_lesion``;
    - ``truth/slide_0000.csv``: ``x,y,w,h,class,nucleus_x,nucleus_y,nucleus_w,nucleus_h`` of every cell.

    Slide ``i`` depends on the seed, on ``i`` and on the settings alone, not on how many slides are made.

    Args:
        output_dir: folder to write to.
        n_slides: number of slides.
        size: side of a slide, level-0 pixels.
        seed: the same seed gives the same pixels.
        num_workers: processes; 0 works in this one.
        slides_per_patient: slides of the same label that share a patient.
        progress: show a progress bar.
        settings: further fields of ``SyntheticSettings``.

    Returns:
        path of the slide table.

    Raises:
        ValueError: when a setting is out of its range.
        Exception: what kept a slide from being made, after the others are made.
    """
    if n_slides < 1 or slides_per_patient < 1:
        raise ValueError(f"n_slides and slides_per_patient must be at least 1, not {n_slides} and {slides_per_patient}")
    folder = Path(output_dir)
    full = SyntheticSettings(size=size, **settings)
    (folder / "truth").mkdir(parents=True, exist_ok=True)
    make = partial(_make_one, folder=folder, seed=seed, settings=full)
    outcomes = list(run_parallel(make, range(n_slides), num_workers, title="slides", progress=progress))
    for outcome in outcomes:
        outcome.unwrap()
    made = {outcome.item: outcome.unwrap() for outcome in outcomes}
    with atomic_path(folder / "slides.csv") as partial_path, open(partial_path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("slide_id", "path", "label", "lesion", "patient_id", "n_cells", "n_lesion"))
        for i in range(n_slides):
            kinds = made[i]
            lesion = sum(kind in LESION_CLASSES for kind in kinds)
            cells = sum(kind != "debris" for kind in kinds)
            patient = f"patient_{i // 2 // slides_per_patient:04d}_{i % 2}"
            writer.writerow((_name(i), f"{_name(i)}.tif", LABELS[i % 2], _lesion(i) or "nilm", patient, cells, lesion))
    return folder / "slides.csv"


def make_slide(
    rng: np.random.Generator, settings: SyntheticSettings, lesion: str | None = None
) -> tuple[np.ndarray, list[PlacedCell]]:
    """Make one slide in memory.

    Args:
        rng: source of everything random.
        settings: what it is made of.
        lesion: ``"lsil"`` or ``"hsil"`` for a positive slide, None for a negative one.

    Returns:
        (size, size, 3) uint8 RGB and the cells that lie on it.
    """
    if lesion is not None and lesion not in LESION_CLASSES:
        raise ValueError(f"lesion must be one of {LESION_CLASSES} or None, not {lesion!r}")
    size, stain = settings.size, Stain.draw(rng, settings.stain_jitter)
    stamps = _place(rng, settings, _bank(rng, settings, stain), stain, lesion)
    glass = (rng.uniform(232, 248) + rng.normal(0, 2.5, 3)).astype(np.float32)
    film = _Film(rng, settings)
    pixels = np.empty((size, size, 3), np.uint8)
    by_band: list[list[tuple[int, int, CellStamp]]] = [[] for _ in range(-(-size // _BAND))]
    for x, y, stamp in stamps:
        for band in range(y // _BAND, (y + stamp.density.shape[0] - 1) // _BAND + 1):
            by_band[band].append((x, y, stamp))
    for number, members in enumerate(by_band):
        top = number * _BAND
        bottom = min(top + _BAND, size)
        density = film(top, bottom)[..., None] * stain.mucus
        for x, y, stamp in members:
            h, w = stamp.density.shape[:2]
            first, last = max(y, top), min(y + h, bottom)
            density[first - top : last - top, x : x + w] += stamp.density[first - y : last - y]
        light = np.exp(np.negative(density, out=density), out=density)
        light *= glass
        light += rng.standard_normal(light.shape, dtype=np.float32) * np.float32(1.6)
        pixels[top:bottom] = np.clip(light, 0, 255, out=light)
    return pixels, [_placed(x, y, stamp) for x, y, stamp in stamps]


def _name(i: int) -> str:
    return f"slide_{i:04d}"


def _lesion(i: int) -> str | None:
    return LESION_CLASSES[i // 2 % len(LESION_CLASSES)] if i % 2 else None


def _make_one(i: int, folder: Path, seed: int, settings: SyntheticSettings) -> list[str]:
    """Make slide ``i`` if it is not there; returns the classes of its cells."""
    path, truth = folder / f"{_name(i)}.tif", folder / "truth" / f"{_name(i)}.csv"
    stamp = json.dumps({"cytossl_synthetic": VERSION, "seed": seed, "slide": i, **asdict(settings)}, sort_keys=True)
    if truth.is_file() and _description(path) == stamp:
        with open(truth, newline="") as stream:
            return [row["class"] for row in csv.DictReader(stream)]
    pixels, cells = make_slide(np.random.default_rng([seed, i]), settings, _lesion(i))
    # The slide is written last: where it is and carries this stamp, its truth table is whole.
    with atomic_path(truth) as partial_path, open(partial_path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("x", "y", "w", "h", "class", "nucleus_x", "nucleus_y", "nucleus_w", "nucleus_h"))
        writer.writerows(tuple(asdict(cell).values()) for cell in cells)
    write_pyramid(path, pixels, settings.mpp, stamp)
    return [cell.kind for cell in cells]


def _description(path: Path) -> str | None:
    """What the generator wrote into a slide; None where there is no slide, or not all of one."""
    if not path.is_file():
        return None
    try:
        with tifffile.TiffFile(path) as tif:
            pages = list(tif.pages)
            ends = [max(map(sum, zip(page.dataoffsets, page.databytecounts))) for page in pages]  # type: ignore[union-attr]
            whole = max(ends) <= path.stat().st_size
            return str(pages[0].description) if whole else None  # type: ignore[union-attr]
    except (tifffile.TiffFileError, IndexError, ValueError, OSError):
        return None  # it is made again


def _bank(rng: np.random.Generator, settings: SyntheticSettings, stain: Stain) -> dict[str, list[CellStamp]]:
    """The slide's cells: each is drawn once and laid down many times, turned and mirrored."""
    return {
        kind: [render_cell(kind, rng, stain, settings.mpp, _focus(rng, settings)) for _ in range(count)]
        for kind, count in _BANK.items()
    }


def _focus(rng: np.random.Generator, settings: SyntheticSettings) -> float:
    """Blur of a cell, micrometres: the optics', or that of a cell above or below the focal plane."""
    return float(rng.uniform(0.6, 1.6) if rng.random() < settings.blur else rng.uniform(0.12, 0.2))


def _place(
    rng: np.random.Generator,
    settings: SyntheticSettings,
    bank: dict[str, list[CellStamp]],
    stain: Stain,
    lesion: str | None,
) -> list[tuple[int, int, CellStamp]]:
    """Choose the cells and where they lie: x, y of each stamp's top-left corner, and the stamp."""
    side_mm = settings.size * settings.mpp / 1000
    crowd = rng.lognormal(0, 0.2)
    n_cells = max(8, int(rng.poisson(settings.density * crowd * side_mm**2 * np.pi / 4)))
    n_lesion = max(2, round(settings.burden * n_cells)) if lesion else 0
    mix = rng.dirichlet((4.0, 5.0, 1.6))
    kinds = list(rng.choice(("superficial", "intermediate", "parabasal"), n_cells - n_lesion, p=mix))
    kinds += ["leukocyte"] * int(rng.poisson(n_cells * settings.leukocytes * rng.lognormal(-0.3, 0.7)))
    kinds += ["debris"] * int(rng.poisson(n_cells * 0.15 * rng.lognormal(-0.3, 0.7)))
    stamps: list[tuple[int, int, CellStamp]] = []
    clusters = _positions(rng, max(1, n_cells // 12), settings.size)
    for kind in kinds:
        stamp = bank[kind][rng.integers(len(bank[kind]))]
        near = clusters if rng.random() < (0.5 if kind != "debris" else 0.1) else None
        stamps.append(_laid(rng, settings, stamp, near))
    groups = _positions(rng, max(1, n_lesion // 3), settings.size)
    for _ in range(n_lesion):
        stamp = render_cell(lesion or "", rng, stain, settings.mpp, _focus(rng, settings))
        stamps.append(_laid(rng, settings, stamp, groups if rng.random() < 0.7 else None))
    return [stamps[i] for i in rng.permutation(len(stamps))]


def _positions(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """(count, 2) float: places within the disc of a liquid-based preparation, pixels."""
    radius, angle = size * 0.48 * np.sqrt(rng.random(count)), rng.random(count) * 2 * np.pi
    return size / 2 + np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _laid(
    rng: np.random.Generator, settings: SyntheticSettings, stamp: CellStamp, clusters: np.ndarray | None
) -> tuple[int, int, CellStamp]:
    if clusters is None:
        centre = _positions(rng, 1, settings.size)[0]
    else:
        centre = clusters[rng.integers(len(clusters))] + rng.normal(0, 32 / settings.mpp, 2)
    turned = stamp.turned(int(rng.integers(4)), bool(rng.random() < 0.5))
    h, w = turned.density.shape[:2]
    strength = np.float32(rng.uniform(0.88, 1.14))
    turned = CellStamp(turned.kind, turned.density * strength, turned.nucleus)
    x = int(np.clip(centre[0] - w / 2, 0, settings.size - w))
    y = int(np.clip(centre[1] - h / 2, 0, settings.size - h))
    return x, y, turned


def _placed(x: int, y: int, stamp: CellStamp) -> PlacedCell:
    h, w = stamp.density.shape[:2]
    nx, ny, nw, nh = stamp.nucleus
    here = (x + nx, y + ny, nw, nh) if nw else (0, 0, 0, 0)
    return PlacedCell(x, y, w, h, stamp.kind, *here)


class _Film:
    """Faint background film over the preparation, drawn coarsely and interpolated a band at a time."""

    def __init__(self, rng: np.random.Generator, settings: SyntheticSettings) -> None:
        self.size, self.stride = settings.size, 64
        cells = -(-settings.size // self.stride) + 2
        noise = rng.standard_normal((cells, cells), dtype=np.float32)
        self.grid = np.clip(noise * 0.5 + 0.3, 0, None) * np.float32(0.12 * rng.uniform(0.2, 1.0))

    def __call__(self, top: int, bottom: int) -> np.ndarray:
        at = np.arange(top, bottom, dtype=np.float32) / self.stride
        low = at.astype(int)
        share = (at - low)[:, None].astype(np.float32)
        rows = self.grid[low] * (1 - share) + self.grid[low + 1] * share
        across = np.arange(self.size, dtype=np.float32) / self.stride
        left = across.astype(int)
        part = (across - left).astype(np.float32)
        return rows[:, left] * (1 - part) + rows[:, left + 1] * part
