"""How well nuclei are found on five sets of real images, with one set of defaults, beside what an Otsu script finds.

    python scripts/bench/nuclei.py --data ../shared/data --workers 2 --sheets /tmp/sheets

Sets (folders of ``--data``), each at the scale that its nuclei suggest; only the slide states its own:
  nuclei_lbc  Papanicolaou, liquid-based, masks        pixel Dice, object F1 at an overlap above one half
  nuclei      grey extended-depth-of-field, masks      the same
  cric        conventional smears, nuclei marked       recall of the marks, share of a frame that is called nucleus
  cells       single cells of five lesions             crops in which at least one nucleus is found
  mgg_fields  Giemsa, cytospin, nuclei marked by hand  F1 of centres, each within the radius of one mark
The batched kernel (``nuclei_mask``) is held against the exact path (``segment_instances``) on the same images.

``--sheets`` writes contact sheets with outlines: of each set, of twenty fields of ``wsi/csf-pap.tif``, of an H&E slide
beside it, and of smears recoloured as Giemsa stains them. Numbers do not show what a look does.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from skimage.filters import gaussian, threshold_otsu
from skimage.io import imread
from skimage.measure import label, regionprops_table
from skimage.segmentation import find_boundaries
from skimage.transform import resize

from cytossl_monai.data import open_slide
from cytossl_monai.metrics.nuclei import ObjectScore, mask_dice, object_f1, point_recall
from cytossl_monai.transforms import nuclei_mask, segment_instances
from cytossl_monai.transforms.kernels.stains import STAINS, combine_stains, od_to_rgb, rgb_to_od, separate_stains
from cytossl_monai.utils import run_parallel

MPP = {"nuclei_lbc": 0.90, "nuclei": 0.36, "cric": 0.25, "cells": 0.25, "mgg_fields": 0.2528}
LESIONS = ("ascus", "asch", "lsil", "hsil", "scc")
MGG_MARKS = Path(__file__).parent / "marks" / "mgg_fields.csv"
"""x, y and radius in pixels of every nucleus; ``smudge``, the spilt nucleus of a burst cell, counts neither way."""
MARK_RADIUS = 8  # pixels: how near to a mark of cric a nucleus must be found
SPECK_UM2 = 6.0  # what is smaller is a crumb of an outline
PANEL = 400  # pixels, the longer side of one picture of a contact sheet


@dataclass(frozen=True)
class Field:
    """One image to segment and what is known about it: a mask, marked nuclei (x, y), circles, or nothing."""

    group: str
    image: Path
    mask: Path | None = None
    marks: tuple[tuple[float, float], ...] = ()
    circles: pd.DataFrame | None = None


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """(3 or 1, H, W) uint8."""
    pixels = imread(path)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels[..., :3].transpose(2, 0, 1))


def read_mask(path: Path) -> NDArray[np.bool_]:
    pixels = imread(path)
    return (pixels if pixels.ndim == 2 else pixels[..., :3].max(-1)) > 127


def otsu_labels(image: NDArray[np.uint8], mpp: float) -> NDArray[np.int32]:
    """What a short script gives: what is darker in red than its surroundings, Otsu twice, rules for size and solidity.

    Otsu's threshold of the plain grey image parts cells from glass, not nuclei from cells: Dice is below 0.2 then.
    """
    side = round(15 / mpp)
    red = gaussian(image[0] / 255.0, 1)
    darker = ndimage.grey_closing(red, size=(side, side)) - red
    if darker.max() < 1e-3:
        return np.zeros(red.shape, np.int32)
    some = darker > threshold_otsu(darker)
    labels = label(ndimage.binary_fill_holes(darker > threshold_otsu(darker[some])) if some.any() else some)
    measured = regionprops_table(labels, properties=("label", "equivalent_diameter_area", "solidity"))
    diameter = measured["equivalent_diameter_area"] * mpp
    keep = measured["label"][(diameter > 4) & (diameter < 20) & (measured["solidity"] > 0.8)]
    return np.asarray(label(np.isin(labels, keep)), dtype=np.int32)


def collect(data: Path, groups: Iterable[str], limit: int | None) -> list[Field]:
    """The fields of the sets that are there."""
    fields: list[Field] = []
    for group in groups:
        if group in ("nuclei_lbc", "nuclei"):
            masks = {p.stem: p for p in (data / group / "masks").iterdir()}
            of_group = [Field(group, p, masks[p.stem]) for p in sorted((data / group / "images").iterdir())]
        elif group == "cric":
            cells = pd.read_csv(data / "cric" / "cells.csv")
            of_group = [
                Field(group, data / "cric" / "images" / str(name), marks=tuple(map(tuple, rows[["x", "y"]].to_numpy())))
                for name, rows in cells.groupby("image")
            ]
        elif group == "mgg_fields":
            circles = pd.read_csv(MGG_MARKS)
            of_group = [
                Field(group, p, circles=circles[circles["image"] == p.name]) for p in sorted((data / group).iterdir())
            ]
        else:
            of_group = [Field(group, p) for kind in LESIONS for p in sorted((data / "cells" / kind).glob("*.jpg"))]
        fields += of_group if limit is None else of_group[:: max(1, len(of_group) // limit)]
    return fields


def centres(labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """(N, 2) x, y of the centroids."""
    rows, columns = np.indices(labels.shape)
    count = np.maximum(np.bincount(labels.ravel())[1:], 1)
    return np.stack([np.bincount(labels.ravel(), axis.ravel())[1:] / count for axis in (columns, rows)], 1)


def circle_score(labels: NDArray[np.int32], circles: pd.DataFrame, mpp: float) -> ObjectScore:
    """Match the centres of what was found one to one with marked circles that hold them; specks are left out."""
    areas = np.bincount(labels.ravel())[1:] * mpp**2
    points = centres(labels)[areas >= SPECK_UM2]
    nuclei = circles[circles["kind"] == "nucleus"]
    smudges = circles[circles["kind"] == "smudge"]
    inside = _within(points, nuclei)
    rows, columns = linear_sum_assignment(inside, maximize=True)
    matched = rows[inside[rows, columns]]
    spared = _within(points, smudges).any(1)
    spared[matched] = False
    return ObjectScore(len(matched), len(points) - len(matched) - int(spared.sum()), len(nuclei) - len(matched))


def _within(points: NDArray[np.float64], circles: pd.DataFrame) -> NDArray[np.bool_]:
    """(points, circles): which point lies in which circle."""
    middle, radius = circles[["x", "y"]].to_numpy(float), circles["radius"].to_numpy(float)
    return np.asarray(np.hypot(*np.moveaxis(points[:, None] - middle[None], -1, 0)) <= radius)


def measure(field: Field) -> list[dict[str, Any]]:
    """One row for each of ours, the batched kernel and the Otsu script."""
    image, mpp = read_rgb(field.image), MPP[field.group]
    exact = segment_instances(image, mpp, table=False).labels
    fast = nuclei_mask(torch.from_numpy(image)[None], mpp)[0, 0].numpy()
    rows = []
    for method, labels in (("exact", exact), ("batched", label(fast)), ("otsu", otsu_labels(image, mpp))):
        row: dict[str, Any] = {"group": field.group, "method": method, "image": field.image.name}
        row["coverage"], row["found"] = float((labels > 0).mean()), bool(labels.any())
        row["agreement"] = mask_dice(labels > 0, exact > 0)
        if field.mask is not None:
            truth = read_mask(field.mask)
            score = object_f1(labels, truth)
            row |= {"dice": mask_dice(labels > 0, truth), "tp": score.true_positives}
            row |= {"fp": score.false_positives, "fn": score.false_negatives}
        if field.circles is not None:
            score = circle_score(labels, field.circles, mpp)
            row |= {"tp": score.true_positives, "fp": score.false_positives, "fn": score.false_negatives}
        if field.marks:
            row["recall"] = point_recall(centres(labels), field.marks, MARK_RADIUS, labels)
            row["recall_centre"] = point_recall(centres(labels), field.marks, MARK_RADIUS)
            row["marks"] = len(field.marks)
        rows.append(row)
    return rows


def summarise(rows: pd.DataFrame) -> None:
    """Print the table of the sets."""
    for (group, method), part in rows.groupby(["group", "method"], observed=True):
        line = f"{group:11s} {method:8s} n={len(part):4d}"
        if group in ("nuclei_lbc", "nuclei"):
            total = ObjectScore(*(int(part[name].sum()) for name in ("tp", "fp", "fn")))
            line += (
                f"  Dice {part['dice'].mean():.3f}  F1 {total.f1:.3f} (P {total.precision:.3f} R {total.recall:.3f})"
            )
        if group == "mgg_fields":
            total = ObjectScore(*(int(part[name].sum()) for name in ("tp", "fp", "fn")))
            line += f"  F1 {total.f1:.3f} (P {total.precision:.3f} R {total.recall:.3f})"
        if group == "cric":
            for name in ("recall", "recall_centre"):
                line += f"  {name} {np.average(part[name], weights=part['marks']):.3f}"
        if group == "cells":
            line += f"  with a nucleus {part['found'].mean():.3f}"
        line += f"  coverage {part['coverage'].mean():.3f}  Dice to exact {part['agreement'].mean():.3f}"
        print(line)


def outlined(image: NDArray[np.uint8], mpp: float) -> NDArray[np.uint8]:
    """(PANEL, PANEL, 3): the image with the outlines of what is found in it, shrunk or enlarged to fit."""
    labels = segment_instances(image, mpp, table=False).labels
    picture = np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0) / 255.0
    scale = PANEL / max(labels.shape)
    shape = tuple(max(1, round(n * scale)) for n in labels.shape)
    picture = resize(picture, shape, anti_aliasing=scale < 1)
    edges = find_boundaries(resize(labels, shape, order=0, preserve_range=True, anti_aliasing=False), mode="inner")
    picture[edges] = (1.0, 0.9, 0.0) if picture.mean() < 0.4 else (0.0, 0.75, 0.0)
    panel = np.ones((PANEL, PANEL, 3))
    panel[: shape[0], : shape[1]] = picture
    return (panel * 255).astype(np.uint8)


def write_sheet(path: Path, pictures: list[tuple[NDArray[np.uint8], float]], columns: int = 5) -> None:
    panels = [outlined(image, mpp) for image, mpp in pictures]
    panels += [np.full_like(panels[0], 255)] * (-len(panels) % columns)
    rows = [np.concatenate(panels[i : i + columns], 1) for i in range(0, len(panels), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path, quality=88)


def slide_fields(path: Path, count: int, mpp: float, size: int) -> list[tuple[NDArray[np.uint8], float]]:
    """Random fields of a slide that hold more than clear glass."""
    rng = np.random.default_rng(0)
    fields: list[tuple[NDArray[np.uint8], float]] = []
    with open_slide(path) as slide:
        mpp = max(mpp, slide.mpp)
        side = round(size * mpp / slide.mpp)
        for _ in range(600):
            x, y = (int(rng.integers(0, max(1, length - side))) for length in (slide.width, slide.height))
            pixels = slide.read_region(x, y, size, mpp)
            if (pixels.min(0) < 190).mean() > 0.08:
                fields.append((np.ascontiguousarray(pixels), mpp))
            if len(fields) == count:
                break
    return fields


def giemsa(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A Papanicolaou image in the colours of Giemsa: the same amounts of stain, other stain vectors."""
    amounts = np.maximum(separate_stains(rgb_to_od(image), "papanicolaou"), 0)
    amounts[1] += amounts[2]
    amounts[2] = 0
    return (od_to_rgb(combine_stains(amounts, STAINS["giemsa"])) * 255).astype(np.uint8)


def write_sheets(folder: Path, data: Path, groups: list[str]) -> None:
    """One contact sheet for each set, for the slides, and for smears in the colours of Giemsa."""
    for group in groups:
        fields = collect(data, [group], 20)[:20]
        write_sheet(folder / f"{group}.jpg", [(read_rgb(f.image), MPP[group]) for f in fields])
    smears = [read_rgb(f.image)[:, :512, :512] for f in collect(data, ["cric"], 10)[:10]]
    write_sheet(folder / "giemsa.jpg", [(giemsa(image), MPP["cric"]) for image in smears])
    for name, mpp in (("csf-pap.tif", 0.25), ("cmu-1-small-region.svs", 0.5)):
        if (data / "wsi" / name).is_file():
            count = 20 if name == "csf-pap.tif" else 10
            write_sheet(folder / f"{Path(name).stem}.jpg", slide_fields(data / "wsi" / name, count, mpp, 512))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--groups", nargs="+", choices=list(MPP), default=list(MPP))
    parser.add_argument("--limit", type=int, help="about so many images a set; default: all")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="write one line an image and method to this file")
    parser.add_argument("--sheets", type=Path, help="write contact sheets with outlines to this folder")
    args = parser.parse_args()

    fields = collect(args.data, args.groups, args.limit)
    outcomes = list(run_parallel(measure, fields, args.workers, title="nuclei"))
    rows = pd.DataFrame([row for outcome in outcomes for row in outcome.unwrap()])
    rows["group"] = pd.Categorical(rows["group"], list(MPP))
    rows = rows.sort_values(["group", "method", "image"])
    if args.csv:
        rows.to_csv(args.csv, index=False)
    summarise(rows)
    if args.sheets:
        write_sheets(args.sheets, args.data, args.groups)


if __name__ == "__main__":
    main()
