"""Slides and tiles as dictionary transforms; see `array`."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.transforms.tiling.array import LoadSlide, LoadTile, TileSlide
from cytossl_monai.utils.errors import TableError

__all__ = [
    "IterateTiles",
    "LabelTilesD",
    "LabelTilesDict",
    "LabelTilesd",
    "LoadSlideD",
    "LoadSlideDict",
    "LoadSlided",
    "LoadTileD",
    "LoadTileDict",
    "LoadTiled",
    "TileSlideD",
    "TileSlideDict",
    "TileSlided",
]


class LoadSlided(MapTransform):
    """Dictionary version of `LoadSlide`.

    Args:
        keys: keys of the slides' paths.
        mpp_key: key of the resolution that overrides the file's, where the item has one and it is not empty.
        backend: as for `LoadSlide`.
        device: as for `LoadSlide`.
        allow_missing_keys: skip keys that an item lacks.
    """

    def __init__(
        self,
        keys: KeysCollection,
        mpp_key: str = "mpp",
        backend: str = "auto",
        device: str = "cpu",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mpp_key = mpp_key
        self.loader = LoadSlide(backend, device=device)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the paths by open slides."""
        out = dict(data)
        given = out.get(self.mpp_key)
        mpp = None if given is None or given == "" or np.isnan(float(given)) else float(given)
        for key in self.key_iterator(out):
            out[key] = self.loader(out[key], mpp)
        return out


class LabelTilesd(MapTransform):
    """Give each tile the label of its slide: 0 for slides of the benign class, 1 for all others.

    Args:
        slides: slide table with labels.
        benign: the label of benign slides.
        keys: key of the slide's name.
        label_key: where the label goes, int64.
        allow_missing_keys: see MONAI.

    Raises:
        TableError: for a cohort without slides of either kind, or a slide without a label.
    """

    def __init__(
        self,
        slides: str | os.PathLike[str],
        benign: str,
        keys: KeysCollection = "slide_id",
        label_key: str = "label",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_key = label_key
        records = read_slide_table(slides)
        bare = [record.slide_id for record in records if record.label is None]
        if bare:
            raise TableError(f"slide {bare[0]} has no label; learning from slide labels needs one for every slide")
        self.labels = {record.slide_id: int(str(record.label) != str(benign)) for record in records}
        if len(set(self.labels.values())) < 2:
            kinds = ", ".join(sorted({str(record.label) for record in records}))
            raise TableError(
                f"{slides} has no {'benign' if 0 not in self.labels.values() else 'other'} slides (benign: {benign!r}; "
                f"the table has {kinds}); VPU learning needs both kinds"
            )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the label to a copy of the item."""
        out = dict(data)
        for key in self.key_iterator(out):
            if out[key] not in self.labels:
                raise TableError(f"slide {out[key]} is not in the slide table that labels come from; add it")
            out[self.label_key] = self.labels[out[key]]
        return out


class TileSlided(MapTransform):
    """Dictionary version of `TileSlide`: one item in, a list of items out, each with all that the item had.

    ``mpp`` and ``slide_mpp`` of each are set to the tile's and the slide's micrometres per pixel.

    Args:
        keys: the key of the slide; one.
        allow_missing_keys: pass items without it.
        kwargs: as for `TileSlide`.

    Raises:
        ValueError: for more than one key.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, **kwargs: Any) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(self.keys) != 1:
            raise ValueError(f"TileSlided takes one key, but was given {self.keys}")
        self.tiler = TileSlide(**kwargs)

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """The list of items. The slide's own handle is closed: `LoadTiled` opens what it reads."""
        for key in self.key_iterator(dict(data)):
            with data[key] as slide:
                own = ("mpp", "slide_mpp")  # the item's "mpp" was the slide's; what comes now is a tile
                return [{**data, key: item, **{name: item[name] for name in own}} for item in self.tiler(slide)]
        return [dict(data)]


class LoadTiled(MapTransform):
    """Dictionary version of `LoadTile`.

    Args:
        keys: keys of the tile items.
        allow_missing_keys: skip keys that an item lacks.
        kwargs: as for `LoadTile`.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, **kwargs: Any) -> None:
        super().__init__(keys, allow_missing_keys)
        self.loader = LoadTile(**kwargs)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the tile items by MetaTensors."""
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = self.loader(out[key])
        return out


class IterateTiles:
    """``patch_iter`` of MONAI's GridPatchDataset: a slide's path in, its tiles one after the other out.

    Args:
        key: key of the path where items are dictionaries; None where they are paths.
        kwargs: as for `TileSlide`.
    """

    def __init__(self, key: str | None = None, **kwargs: Any) -> None:
        self.key = key
        self.load_slide = LoadSlide()
        self.tiler = TileSlide(**kwargs)
        self.load_tile = LoadTile(max_open=1)

    def __call__(self, data: Any) -> Iterator[tuple[Any, np.ndarray]]:
        """Yield (tile or item with its tile, [[x0, x1], [y0, y1]] in level-0 pixels)."""
        with self.load_slide(data if self.key is None else data[self.key]) as slide:
            items = self.tiler(slide)
        for item in items:
            side = item["size"] * item["mpp"] / item["slide_mpp"]
            coords = np.array([[item["x"], item["x"] + side], [item["y"], item["y"] + side]])
            tile = self.load_tile(item)
            yield (tile if self.key is None else {**data, self.key: tile}), coords


LoadSlideD = LoadSlideDict = LoadSlided


TileSlideD = TileSlideDict = TileSlided


LoadTileD = LoadTileDict = LoadTiled
LabelTilesD = LabelTilesDict = LabelTilesd
