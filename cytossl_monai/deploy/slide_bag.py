"""A slide's path in, its bag of tile features out: the first step of an application."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Transform
from torch import Tensor

from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.index.fields import instance_fields
from cytossl_monai.inference.embed import EmbedTimes, embed_tiles
from cytossl_monai.inference.instances import sound_instances
from cytossl_monai.inference.slides import IndexSlided, slide_records
from cytossl_monai.networks.nets.encoder import encoder_hash
from cytossl_monai.networks.open import open_encoder
from cytossl_monai.utils.errors import failure
from cytossl_monai.utils.parallel import default_workers

__all__ = ["SlideToBag", "find_slides"]


def find_slides(path: str | os.PathLike[str], mpp: float | None = None) -> list[SlideRecord]:
    """The slides that an application is given: a file, or a folder of them.

    A folder that holds one DICOM slide (a series of ``.dcm`` files) is one slide.

    Args:
        path: the file or folder.
        mpp: micrometres per pixel at level 0, where the files do not say.

    Raises:
        TableError: when the folder holds no slide, or does not exist.
    """
    given = Path(path)
    if not given.is_dir():
        return slide_records(slide=given, mpp=mpp)
    parts = sorted(given.glob("*.dcm"))
    if parts and not [p for p in given.iterdir() if p.is_file() and p.suffix.lower() != ".dcm"]:
        # OpenSlide gathers a series from any of its files: each would be the whole slide again.
        return slide_records(slide=parts[0], mpp=mpp)
    return slide_records(folder=given, mpp=mpp)


class SlideToBag(Transform):
    """Index a slide and embed its tiles; memory does not grow with the slide's pixels.

    Args:
        encoder: encoder file (``model.pt`` of pretraining), or any other that `open_encoder` opens.
        work_dir: folder for the index.
        tile_size: side of a tile in pixels at ``mpp``; None: that of the encoder's card or file, else 224.
        mpp: micrometres per pixel that tiles are read at; None: that of the encoder's card or file, else 0.5.
        index_settings: other fields of `IndexSettings`; None takes the defaults.
        batch_size: tiles at once.
        device: where to decode, to find nuclei and to encode.
        num_threads: reading threads; None takes one for each CPU core.
        weights: the weights' file or folder, where ``encoder`` is a card.
        instances: ``"tiles"``, or ``"nuclei"``: fields centred on a nucleus each; as the classifier was trained.
        fields: with ``instances="nuclei"``, arguments of `NucleusFields`.

    Raises:
        CheckpointError: when the encoder cannot be loaded.
    """

    def __init__(
        self,
        encoder: str | os.PathLike[str],
        work_dir: str | os.PathLike[str],
        tile_size: int | None = None,
        mpp: float | None = None,
        index_settings: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
        num_threads: int | None = None,
        weights: str | os.PathLike[str] | None = None,
        instances: str = "tiles",
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        self.device, self.batch_size = torch.device(device), batch_size
        self.num_threads = default_workers() if num_threads is None else num_threads
        self.encoder, _ = open_encoder(encoder, weights, self.device)
        self.encoder.source = str(encoder)  # type: ignore[assignment]
        self.encoder_hash = encoder_hash(self.encoder)
        # In this process: the SDK's runtime installs signal handlers and threads that a forked one must not inherit.
        self.index = IndexSlided(
            work_dir,
            int(tile_size or self.encoder.meta.get("tile_size") or 224),
            float(mpp or self.encoder.meta.get("mpp") or 0.5),
            index_settings,
            num_threads,
            device,
            isolate=False,
            fields=instance_fields(instances, fields),
        )

    def __call__(self, data: Mapping[str, Any] | SlideRecord | str | os.PathLike[str]) -> dict[str, Any]:
        """Read one slide.

        Args:
            data: path of the slide, its record, or an item with ``record``.

        Returns:
            the item: ``slide_id``, ``record``, ``index``, ``features`` (N, D) float32 array, ``encoder`` (hash),
            ``times``; or ``problem``, the pair (``"empty"`` or ``"failed"``, why), in place of features.
        """
        if isinstance(data, Mapping):
            item = dict(data)
        else:
            record = data if isinstance(data, SlideRecord) else slide_records(slide=data)[0]
            item = {"slide_id": record.slide_id, "record": record}
        item = self.index(item)
        item["encoder"], item["times"] = self.encoder_hash, EmbedTimes()
        if "problem" in item:
            return item
        record = item["record"]
        try:
            with open_slide(record.path, mpp=record.mpp) as slide:
                item["index"] = sound_instances(slide, item["index"], self.num_threads)
                item["features"] = embed_tiles(
                    slide,
                    item["index"],
                    self.encoder,
                    self.batch_size,
                    self.device,
                    num_threads=self.num_threads,
                    times=item["times"],
                )
        except Exception as error:  # noqa: BLE001 - every failure of a slide is its own, whatever it is
            item["problem"] = ("failed", failure(error))
        return item

    def bag(self, item: Mapping[str, Any]) -> Tensor:
        """(N, D) float32 features of an item; one row of zeros for a slide without any, which nobody may believe."""
        if "problem" in item:
            return torch.zeros(1, self.encoder.embed_dim)
        return torch.from_numpy(item["features"])
