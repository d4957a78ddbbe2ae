"""Malformed inputs by class, each from a seed: the same number gives the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import itk  # noqa: F401 - loaded once, before the cases fork
import numpy as np
import openslide  # noqa: F401 - the same
import pyarrow.parquet as pq
import tifffile
import torch
from PIL import Image

from cytossl_monai.data.bags.features import read_features, write_features
from cytossl_monai.data.slide_table import read_slide_table, write_slide_table
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.write import write_pyramid
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.engines.bundle import read_config_file
from cytossl_monai.networks.files import load_classifier, load_encoder, save_classifier, save_encoder
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.transforms.nuclei.imported import labels_from_geojson

with contextlib.suppress(ImportError):
    import cucim  # noqa: F401 - the same

SIDE, TILE = 1024, 256
ROOT = Path(__file__).resolve().parents[2]
TRAIN, OVERLAY = ROOT / "bundles/cytossl_pretrain/configs/train.json", ROOT / "configs/data/mixed.yaml"
CODE = "$__import__('pathlib').Path({marker!r}).touch()"
"""What a cell or a name holds that must never be run."""


@dataclass(frozen=True)
class Whole:
    """Sound inputs, made once, that the classes below spoil."""

    folder: Path

    def __post_init__(self) -> None:
        rng = np.random.default_rng(1)
        small = Image.fromarray(rng.integers(60, 250, (SIDE // 16, SIDE // 16, 3), dtype=np.uint8))
        write_pyramid(self.slide, np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)), 0.25)
        write_features(self.features, rng.random((9, 8)), rng.integers(0, 900, (9, 2)), {"encoder": "e"})
        records = "slide_id,path,label,patient_id\na,a.tif,0,p\nb,b.tif,1,q\n"
        self.table.write_text(records)
        write_slide_table(self.table, read_slide_table(self.table))
        torch.manual_seed(0)
        network = SRTransformer(3, 32, 8, 24, 48, 1, 3, class_token=True)
        save_encoder(self.encoder, Encoder(network))
        model = MILClassifier(ABMIL(8, 2, 8, 8), ["0", "1"], encoder={"hash": "e", "name": "e", "dim": 8})
        save_classifier(self.classifier, model)

    @property
    def slide(self) -> Path:
        return self.folder / "whole.tif"

    @property
    def features(self) -> Path:
        return self.folder / "whole.h5"

    @property
    def table(self) -> Path:
        return self.folder / "whole.csv"

    @property
    def encoder(self) -> Path:
        return self.folder / "encoder.pt"

    @property
    def classifier(self) -> Path:
        return self.folder / "classifier.pt"


def places() -> np.ndarray:
    """(16, 2) corners of the slide's tiles."""
    columns, rows = np.meshgrid(np.arange(SIDE // TILE), np.arange(SIDE // TILE))
    return np.stack([columns.ravel(), rows.ravel()], 1) * TILE


# -- readers: what the package does with each kind of file ------------------------------------------------------------


def use_slide(path: Path) -> str:
    with open_slide(path) as slide:
        images, sound = slide.read_sound(places(), TILE)
        slide.thumbnail(128)
    return f"{int(sound.sum())} of {len(images)} tiles"


def use_damaged_slide(path: Path) -> str:
    """As `use_slide`; "wrong" where a tile that passes for sound is another picture than the original's."""
    with open_slide(path) as slide, open_slide(path.parent / "whole.tif") as original:
        images, sound = slide.read_sound(places(), TILE)
        expected = original.read_regions(places(), TILE)
    difference = np.abs(images.astype(int) - expected).mean((1, 2, 3))
    spoilt = int(((difference > 1) & sound).sum())
    return f"wrong: {spoilt} tiles" if spoilt else f"{int(sound.sum())} sound tiles"


def use_configuration(path: Path) -> str:
    return f"{len(read_config_file(path))} settings"


def use_table(path: Path) -> str:
    return f"{len(read_slide_table(path))} slides"


def use_features(path: Path) -> str:
    return str(read_features(path).features.shape)


def use_index(path: Path) -> str:
    return f"{len(TileIndex.read(path))} tiles"


def use_encoder(path: Path) -> str:
    return str(load_encoder(path)[0].embed_dim)


def use_classifier(path: Path) -> str:
    return str(load_classifier(path).classes)


def use_nuclei(path: Path) -> str:
    return str(labels_from_geojson(path, (64, 64)).max())


# -- classes of damage ------------------------------------------------------------------------------------------------


def overwrite(source: Path, target: Path, rng: np.random.Generator) -> Path:
    """Zeros or noise over one to three stretches, short and long, anywhere in the file."""
    content = bytearray(source.read_bytes())
    for _ in range(rng.integers(1, 4)):
        length = int(min(len(content), 2 ** rng.uniform(0, np.log2(len(content)))))
        start = int(rng.integers(0, len(content) - length + 1))
        zeros = rng.random() < 0.5
        content[start : start + length] = bytes(length) if zeros else rng.bytes(length)
    target.write_bytes(content)
    return target


def cut(source: Path, target: Path, rng: np.random.Generator) -> Path:
    content = source.read_bytes()
    target.write_bytes(content[: int(rng.integers(0, len(content)))])
    return target


def noise(target: Path, rng: np.random.Generator, start: bytes = b"") -> Path:
    target.write_bytes(start + rng.bytes(int(rng.integers(0, 5000))))
    return target


def spoil_tile(whole: Whole, target: Path, rng: np.random.Generator) -> Path:
    """Damage inside one compressed tile of level 0, 16 bytes to half of it."""
    content = bytearray(whole.slide.read_bytes())
    with tifffile.TiffFile(whole.slide) as tiff:
        page: Any = tiff.pages[0]
        tile = int(rng.integers(len(page.dataoffsets)))
        offset, count = page.dataoffsets[tile], page.databytecounts[tile]
    length = int(rng.integers(16, max(17, count // 2)))
    start = offset + int(rng.integers(0, count - length))
    content[start : start + length] = bytes(length) if rng.random() < 0.5 else rng.bytes(length)
    target.write_bytes(content)
    return target


def spoil_tags(whole: Whole, target: Path, rng: np.random.Generator) -> Path:
    """Other numbers in the tags of the first directory."""
    content = bytearray(whole.slide.read_bytes())
    with tifffile.TiffFile(whole.slide) as tiff:
        tags = list(tiff.pages[0].tags)
    for tag in rng.choice(len(tags), size=2, replace=False):
        width = int(rng.choice([1, 2, 4]))
        value = int(rng.choice([0, 1, 2, 5, 255, 65535, 2**31 - 1, int(rng.integers(0, 2**31))]))
        place = tags[tag].offset + int(rng.choice([0, 2, 4, 8]))
        content[place : place + width] = (value % 256**width).to_bytes(width, "little")
    target.write_bytes(content)
    return target


def other_pixels(target: Path, rng: np.random.Generator) -> Path:
    """Images that are no 8-bit RGB slide, or state no usable resolution."""
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (np.uint16, {}), (np.int8, {}), (np.float32, {}), (np.uint8, {"planarconfig": "separate"}),
        (np.uint8, {"resolution": (40_000, 20_000)}), (np.uint8, {"resolution": (72, 72)}),
        (np.uint8, {"resolution": (0, 0)}),
    ]  # fmt: skip
    dtype, options = kinds[int(rng.integers(len(kinds)))]
    channels = int(rng.choice([1, 2, 3, 4, 5])) if not options else 3
    shape = (channels, 300, 300) if options.get("planarconfig") == "separate" else (300, 300, channels)
    pixels = rng.integers(0, 100, shape).astype(dtype)
    settings = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER", "metadata": None, **options}
    tifffile.imwrite(target, pixels, photometric="rgb" if channels >= 3 else "minisblack", **settings)
    return target


def strange_png(target: Path, rng: np.random.Generator) -> Path:
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(target)
    content = bytearray(target.read_bytes())
    content[16:24] = rng.integers(0, 2**31, 2).astype(">u4").tobytes()
    target.write_bytes(content)
    return target


def pipe(target: Path, rng: np.random.Generator) -> Path:
    del rng
    os.mkfifo(target)
    return target


def strange_table(whole: Whole, target: Path, rng: np.random.Generator) -> Path:
    """A table with cells that are code, formulas, controls, quotes, long or of another language."""
    marker = str(target.parent / "RUN")
    cells = [
        CODE.format(marker=marker), f"@{marker}", "%slides", "=1+1", "../../x", "~nobody-here/x", "a\0b", '"', "'",
        "nan",
        "1.0", "1", "x" * int(rng.integers(1, 300_000)), "\N{RIGHT-TO-LEFT OVERRIDE}a", "é", "CON",
        "index.html", "", " ", "-1", "1e400",
    ]  # fmt: skip
    rows = [line.split(",") for line in whole.table.read_text().splitlines()]
    for _ in range(rng.integers(1, 4)):
        row = rows[int(rng.integers(len(rows)))]
        row[int(rng.integers(len(row)))] = cells[int(rng.integers(len(cells)))]
    if rng.random() < 0.3:
        rows[int(rng.integers(len(rows)))].append("")
    target.write_text("\n".join(",".join(row) for row in rows), encoding="utf-8")
    return target


def strange_json(target: Path, rng: np.random.Generator) -> Path:
    """Nested JSON of random shape, with names that datalists and GeoJSON know."""

    def value(depth: int) -> Any:
        kind = int(rng.integers(0, 9 if depth < 4 else 6))
        if kind < 6:
            return [None, True, float(rng.normal()), "x", int(rng.integers(0, 9)), CODE.format(marker="RUN")][kind]
        if kind == 6:
            return [value(depth + 1) for _ in range(rng.integers(0, 4))]
        names = ["type", "features", "geometry", "coordinates", "image", "training", "label", "fold", "properties"]
        types = ["FeatureCollection", "Feature", "Polygon", "MultiPolygon", "GeometryCollection", "Point"]
        found = {name: value(depth + 1) for name in rng.choice(names, 4, replace=False).tolist()}
        return {**found, "type": types[int(rng.integers(len(types)))]} if kind == 7 else found

    text = json.dumps(value(0))
    draw = rng.random()
    text = "[" * 50_000 if draw < 0.05 else "1" * 6000 if draw < 0.1 else text
    target.write_text(text)
    return target


def strange_features(target: Path, rng: np.random.Generator) -> Path:
    shapes = [(9, 8), (8,), (), (0, 8), (9, 0), (1, 9, 8), (2, 9, 8), (8, 9, 2)]
    dtypes = [np.float32, np.float16, np.complex64, np.bool_, "S4", np.int8]
    with h5py.File(target, "w") as file:
        name = str(rng.choice(["features", "feats", "x"]))
        if rng.random() < 0.15:
            file.create_group(name)
        elif rng.random() < 0.15:
            file.create_dataset(name, (10**9, 4096), np.float32, chunks=(64, 64))
        elif rng.random() < 0.1:
            file[name] = h5py.ExternalLink("/etc/passwd", "x")
        else:
            data = rng.random(shapes[int(rng.integers(len(shapes)))]) * 3
            file[name] = np.asarray(data).astype(dtypes[int(rng.integers(len(dtypes)))])
        if rng.random() < 0.7:
            file["coords"] = rng.random((9, int(rng.choice([2, 2, 2, 3])))) * rng.choice([1e3, np.inf, np.nan, 1e30])
    return target


def strange_facts(whole: Whole, target: Path, rng: np.random.Generator) -> Path:
    """An index whose rows or facts cannot be."""
    import pandas as pd

    from cytossl_monai.data.tiles.index_file import COLUMNS

    del whole
    numbers = [0, -1, 1, 448, 10**9, float("nan"), float("inf")]
    pick: Callable[[], Any] = lambda: numbers[int(rng.choice(len(numbers)))]  # noqa: E731
    row = {"slide_id": "a", "x": 0, "y": 0, "size": 448, "level": 0, "mpp": 0.5, "n_nuclei": 1}
    table = pd.DataFrame([{name: row.get(name, 0.5) for name in COLUMNS}])
    facts = {
        "slide_id": "a", "slide_path": "/a.tif", "level0_mpp": 0.25, "width": 1000, "height": 1000,
        "settings": {"tile_size": 224, "mpp": 0.5},
    }  # fmt: skip
    TileIndex(table, facts).write(target)
    spoilt: dict[str, Any] = {**facts, str(rng.choice(list(facts))): [pick(), "x", None, []][int(rng.integers(4))]}
    rows = pq.read_table(target)
    if rng.random() < 0.5:
        column = str(rng.choice(["x", "y", "size", "mpp"]))
        number = pick()
        if column == "mpp" or np.isfinite(number):
            values = rows.column(column).to_pandas() * 0 + (number if column == "mpp" else int(number))
            kind = rows.schema.field(column).type
            rows = rows.set_column(rows.schema.get_field_index(column), column, [values.astype(kind.to_pandas_dtype())])
        spoilt = facts if rng.random() < 0.5 else spoilt
    pq.write_table(rows.replace_schema_metadata({b"cytossl_tile_index": json.dumps(spoilt).encode()}), target)
    return target


Class = tuple[str, Callable[[Whole, Path, np.random.Generator], Path], Callable[[Path], str]]

CLASSES: dict[str, Class] = {
    "slide: bytes overwritten": (".tif", lambda w, t, r: overwrite(w.slide, t, r), use_slide),
    "slide: one tile damaged": (".tif", spoil_tile, use_damaged_slide),
    "slide: cut off": (".tif", lambda w, t, r: cut(w.slide, t, r), use_slide),
    "slide: other numbers in tags": (".tif", spoil_tags, use_slide),
    "slide: noise after a TIFF header": (".tif", lambda w, t, r: noise(t, r, b"II*\0\x08\0\0\0"), use_slide),
    "slide: other pixels, resolutions": (".tif", lambda w, t, r: other_pixels(t, r), use_slide),
    "slide: PNG of absurd size": (".png", lambda w, t, r: strange_png(t, r), use_slide),
    "slide: named pipe": (".tif", lambda w, t, r: pipe(t, r), use_slide),
    "table: strange cells": (".csv", strange_table, use_table),
    "table: bytes overwritten": (".csv", lambda w, t, r: overwrite(w.table, t, r), use_table),
    "datalist: strange JSON": (".json", lambda w, t, r: strange_json(t, r), use_table),
    "nuclei: strange JSON": (".geojson", lambda w, t, r: strange_json(t, r), use_nuclei),
    "features: bytes overwritten": (".h5", lambda w, t, r: overwrite(w.features, t, r), use_features),
    "features: strange arrays": (".h5", lambda w, t, r: strange_features(t, r), use_features),
    "index: strange rows and facts": (".parquet", strange_facts, use_index),
    "index: noise": (".parquet", lambda w, t, r: noise(t, r, b"PAR1"), use_index),
    "encoder: bytes overwritten": (".pt", lambda w, t, r: overwrite(w.encoder, t, r), use_encoder),
    "encoder: cut off": (".pt", lambda w, t, r: cut(w.encoder, t, r), use_encoder),
    "classifier: bytes overwritten": (".pt", lambda w, t, r: overwrite(w.classifier, t, r), use_classifier),
    "classifier: cut off": (".pt", lambda w, t, r: cut(w.classifier, t, r), use_classifier),
    "configuration: bytes overwritten": (".json", lambda w, t, r: overwrite(TRAIN, t, r), use_configuration),
    "configuration: cut off": (".json", lambda w, t, r: cut(TRAIN, t, r), use_configuration),
    "overlay: bytes overwritten": (".yaml", lambda w, t, r: overwrite(OVERLAY, t, r), use_configuration),
    "overlay: cut off": (".yaml", lambda w, t, r: cut(OVERLAY, t, r), use_configuration),
}
"""Name of the class: suffix of its files, what makes one, and what the package does with it."""
