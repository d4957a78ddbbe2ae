"""Tiles to features: a thread decodes ahead while the encoder works; one feature file a slide."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn
from tqdm import tqdm

from cytossl_monai.data.bags.choice import TileChoice
from cytossl_monai.data.bags.features import read_feature_attrs, write_features
from cytossl_monai.data.slide_table import SlideRecord, read_slide_table
from cytossl_monai.data.slides.cache import SlideCache
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.index.fields import NucleusFields, instance_fields, nucleus_fields
from cytossl_monai.inference.ahead import read_ahead
from cytossl_monai.inference.instances import in_words, index_hash, sound_instances
from cytossl_monai.inference.prepare import fitting_batch, prepare_encoder, warn_of_other_features, warn_of_tile_size
from cytossl_monai.inference.turns import in_turn
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
from cytossl_monai.networks.open import open_encoder
from cytossl_monai.utils.device_results import one_behind
from cytossl_monai.utils.errors import FeatureError, SlideError, TableError
from cytossl_monai.utils.files import file_fingerprint
from cytossl_monai.utils.parallel import default_workers
from cytossl_monai.utils.report import RunReport
from cytossl_monai.utils.shard import ALL, Shard, choose_shard

__all__ = [
    "EmbedTimes",
    "FeatureEmbedder",
    "embed_slides",
    "embed_tiles",
    "embed_to_file",
]

logger = logging.getLogger(__name__)


@dataclass
class EmbedTimes:
    """Where the time of one slide went, in seconds.

    Args:
        total: from the first read to the last feature.
        encoder: the rest: the encoder, and bringing its results to the host.
        waiting: spent waiting for the reader.
        tiles: tiles embedded.
    """

    total: float = 0.0
    encoder: float = 0.0
    waiting: float = 0.0
    tiles: int = 0


@torch.inference_mode()
def embed_tiles(
    slide: Slide,
    index: TileIndex,
    encoder: nn.Module,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    amp: bool = False,
    num_threads: int = 1,
    inferer: Inferer | None = None,
    times: EmbedTimes | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Encode the tiles of an index.

    Args:
        slide: the open slide; read from a thread of its own while this runs.
        index: its tiles.
        encoder: (B, 3, H, W) uint8 to (B, D).
        batch_size: tiles at once.
        device: where the encoder is.
        amp: bfloat16 autocast.
        num_threads: decoding threads (cuCIM).
        inferer: MONAI inferer that calls the encoder; None calls it directly.
        times: filled in, where given.
        progress: show a progress bar.

    Returns:
        (N, D) float32.

    Raises:
        FeatureError: when the index holds no tile, or the encoder gives NaN.
        SlideError: when a tile cannot be read.
    """
    coords, device = index.coords, torch.device(device)
    if not len(coords):
        raise FeatureError(f"the index of {index.slide_path} holds no tile; there is nothing to embed")
    inferer = inferer or SimpleInferer()
    times = times if times is not None else EmbedTimes()
    begin, waited = time.perf_counter(), 0.0

    def read(i: int) -> Tensor:
        part = coords[i * batch_size : (i + 1) * batch_size]
        tiles, sound = slide.read_sound(part, index.tile_size, index.mpp, num_threads)
        if not sound.all():
            x, y = part[int(np.argmin(sound))].tolist()
            raise SlideError(
                f"{slide.path} is damaged: its tile at {x}, {y} was kept by the index and cannot be decoded now; copy "
                f"the file again, or delete {index.slide_id}.parquet and index the slide again to leave the tile out"
            )
        batch = torch.as_tensor(tiles)
        # Page-locked, a batch is copied while the device works.
        return batch.pin_memory() if device.type == "cuda" and batch.device.type == "cpu" else batch

    def encoded(reader: Iterator[Tensor]) -> Iterator[Tensor]:
        nonlocal waited
        asked = time.perf_counter()
        for tiles in reader:
            waited += time.perf_counter() - asked
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                out = inferer(tiles.to(device, non_blocking=True), encoder)
            yield out
            asked = time.perf_counter()

    features: np.ndarray | None = None
    done = 0
    with (
        closing(read_ahead(read, -(-len(coords) // batch_size))) as reader,  # type: ignore[type-var]
        tqdm(total=len(coords), desc=f"embed {index.slide_id}", unit="tile", disable=not progress) as bar,
    ):
        for values in one_behind(encoded(reader)):
            if features is None:
                features = np.empty((len(coords), values.shape[1]), np.float32)
            features[done : done + len(values)] = values
            done += len(values)
            bar.update(len(values))
    taken = time.perf_counter() - begin
    times.total, times.waiting = times.total + taken, times.waiting + waited
    times.encoder += taken - waited
    times.tiles += len(coords)
    if features is None or not np.isfinite(features).all():
        raise FeatureError(f"the encoder gives NaN or infinite features on {slide.path}; use another checkpoint")
    return features


def feature_attributes(
    slide: Slide, index: TileIndex, encoder_id: str, encoder_name: str, license: str | None = None
) -> dict[str, Any]:
    """What a feature file says about how it was made: with CLAM's and TRIDENT's names where they have one."""
    return {
        "slide_id": index.slide_id,
        "name": index.slide_id,
        "slide_path": str(slide.path),
        "fingerprint": file_fingerprint(slide.path),
        "index_hash": index_hash(index),
        "encoder": encoder_id,
        "encoder_name": encoder_name,
        "encoder_license": license,
        "patch_size": index.tile_size,
        "mpp": index.mpp,
        "level0_mpp": slide.mpp,
        "level0_width": slide.width,
        "level0_height": slide.height,
        "overlap": 0,
    }


def is_current(path: Path, slide_path: Path, index: TileIndex, encoder_id: str, dtype: str) -> bool:
    """Whether a feature file was made from this very slide, index and encoder."""
    if not path.is_file():
        return False
    try:
        attrs = read_feature_attrs(path)
    except FeatureError:
        return False  # damaged: it is made again
    return (
        attrs.get("encoder") == encoder_id
        and attrs.get("index_hash") == index_hash(index)
        and attrs.get("fingerprint") == file_fingerprint(slide_path)
        and attrs.get("stored_as") == dtype
    )


def embed_to_file(
    path: Path,
    record: SlideRecord,
    index: TileIndex,
    encoder: nn.Module,
    encoder_id: str,
    encoder_name: str,
    batch_size: int,
    device: str | torch.device,
    dtype: Literal["float32", "float16"],
    amp: bool,
    num_threads: int,
    inferer: Inferer | None = None,
    times: EmbedTimes | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, TileIndex]:
    """Embed one slide and write its feature file; fields around nuclei on damaged places are left out.

    Args:
        path: the feature file.
        record: the slide.
        index: its tiles.
        encoder: on ``device``, in evaluation mode.
        encoder_id: its hash.
        encoder_name: kept in the file.
        batch_size: tiles at once.
        device: where the encoder is. Slides are decoded on the host: an H100 decoded 136 tiles a second by cuCIM,
            four threads of its host 2,193 (docs/benchmarks/gpu.md).
        dtype: how features are stored.
        amp: bfloat16 autocast.
        num_threads: decoding threads (cuCIM).
        inferer: as for `embed_tiles`.
        times: as for `embed_tiles`.
        progress: as for `embed_tiles`.

    Returns:
        (N, D) float32, as computed, and the index of what they are of, see `sound_instances`.

    Raises:
        FeatureError: as `embed_tiles` does.
        SlideError: when the slide cannot be read.
    """
    with open_slide(record.path, mpp=record.mpp, local=record.local) as slide:
        index = sound_instances(slide, index, num_threads)
        features = embed_tiles(
            slide, index, encoder, batch_size, device, amp, num_threads, inferer, times, progress=progress
        )
        license = (getattr(encoder, "meta", None) or {}).get("license")
        attrs = {**feature_attributes(slide, index, encoder_id, encoder_name, license), "stored_as": dtype}
        attrs["scales"] = int(getattr(encoder, "scales", 1))
        if "instances" in index.meta:
            attrs["instances"] = str(index.meta["instances"])
            attrs["unreadable_fields"] = int(index.meta.get("unreadable_fields", 0))
    write_features(path, features, index.coords, attrs, dtype)
    return features, index


def embed_slides(
    records: Sequence[SlideRecord],
    index_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    encoder: Encoder,
    encoder_name: str = "",
    batch_size: int | None = 32,
    device: str | torch.device = "cpu",
    dtype: Literal["float32", "float16"] = "float32",
    amp: bool = False,
    num_threads: int | None = 1,
    inferer: Inferer | None = None,
    progress: bool = True,
    channels_last: bool = False,
    compile: bool = False,
    shard: Shard = ALL,
    cache: SlideCache | None = None,
    tiles_per_slide: int | None = None,
    seed: int = 0,
    fields: NucleusFields | None = None,
) -> RunReport:
    """Embed many slides; a feature file made from the same slide, index and encoder stays.

    Writes ``<slide_id>.h5`` for each slide and ``report.csv``. A slide that fails is reported, the others go on.

    Args:
        records: the slides.
        index_dir: folder of their tile indexes, ``<slide_id>.parquet``.
        output_dir: folder to write to.
        encoder: as `open_encoder` gives it.
        encoder_name: kept in the files.
        batch_size: tiles at once; None finds once what fits.
        device: where to encode; slides are decoded on the host.
        dtype: how features are stored.
        amp: bfloat16 autocast.
        num_threads: decoding threads (cuCIM); None takes one for each CPU core.
        inferer: MONAI inferer that calls the encoder.
        progress: show progress bars.
        channels_last: see `prepare_encoder`.
        compile: see `prepare_encoder`.
        shard: which of the slides to do; the report is then ``report.<i>-of-<n>.csv``.
        cache: copies slides ahead to a faster disk.
        tiles_per_slide: embed so many random tiles of a slide that do not overlap; None: all.
        seed: of that choice.
        fields: None embeds the tiles of the index, else fields centred on its nuclei.

    Returns:
        the report, written as well.
    """
    folder, index_folder = Path(output_dir), Path(index_dir)
    folder.mkdir(parents=True, exist_ok=True)
    records = shard.select(records, lambda record: record.slide_id)
    report = RunReport("embed", shard.claim(folder / "report.csv"))
    num_threads = default_workers() if num_threads is None else num_threads
    encoder_id = encoder_hash(encoder)
    encoder = prepare_encoder(encoder, device, channels_last, compile)
    warn_of_other_features(folder, encoder_id, encoder_name)
    warned = False

    choose = TileChoice(tiles_per_slide, seed)

    def needed(record: SlideRecord) -> bool:
        path = folder / f"{record.slide_id}.h5"
        return not is_current(path, record.path, choose(_index_of(record, index_folder, fields)), encoder_id, dtype)

    turns = in_turn(records, folder, "embedding", cache, needed)
    quiet = not progress or len(records) < 2
    try:
        for record in tqdm(turns, desc="embed", unit="slide", total=len(records), disable=quiet):
            with report.item(record.slide_id) as line:
                path = folder / f"{record.slide_id}.h5"
                index = choose(_index_of(record, index_folder, fields))
                line.message = in_words(index)
                warned = warned or warn_of_tile_size(encoder, index.tile_size, index.mpp)
                if is_current(path, record.path, index, encoder_id, dtype):
                    if fields is not None:
                        line.message = in_words(index, int(read_feature_attrs(path).get("unreadable_fields", 0)))
                    line.status = "current"
                    continue
                if batch_size is None:
                    batch_size = fitting_batch(encoder, index.tile_size, device, amp)
                _, made = embed_to_file(
                    path, record, index, encoder, encoder_id, encoder_name, batch_size, device, dtype, amp, num_threads,
                    inferer, progress=progress,
                )  # fmt: skip
                line.message = in_words(made)
    finally:
        report.save()
    return report


def _index_of(record: SlideRecord, folder: Path, fields: NucleusFields | None = None) -> TileIndex:
    """The slide's index, refused when the slide has changed since."""
    path = folder / f"{record.slide_id}.parquet"
    index = TileIndex.read(path)
    if not record.path.exists():
        raise TableError(f"{record.path} does not exist; correct its path in the slide table")
    made_from = index.meta.get("fingerprint")
    if made_from is not None and made_from != file_fingerprint(record.path):
        raise TableError(f"{record.path} has changed since it was indexed; index it again")
    return nucleus_fields(index, path, fields)


class FeatureEmbedder:
    """What the configuration ``embed.json`` runs: slides and their indexes in, feature files out.

    Args:
        slides: slide table or datalist.
        index_dir: folder of the tile indexes.
        output_dir: folder to write to.
        encoder: any encoder that `open_encoder` opens.
        inferer: MONAI inferer that calls the encoder.
        weights: the weights' file or folder, where ``encoder`` is a card.
        shard: ``"i/n"``; None looks for an array job, see `choose_shard`.
        instances: ``"tiles"`` of the grid, or ``"nuclei"``: fields centred on each, see `NucleusFields` for ``fields``.
        kwargs: as for `embed_slides`.
    """

    def __init__(
        self,
        slides: str | os.PathLike[str],
        index_dir: str | os.PathLike[str],
        output_dir: str | os.PathLike[str],
        encoder: str | os.PathLike[str],
        inferer: Inferer | None = None,
        weights: str | os.PathLike[str] | None = None,
        shard: str | None = None,
        two_scales: bool = False,
        instances: str = "tiles",
        fields: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.two_scales = two_scales
        self.slides, self.index_dir, self.output_dir = Path(slides), Path(index_dir), Path(output_dir)
        self.encoder, self.weights, self.inferer = encoder, weights, inferer
        self.options = {**kwargs, "fields": instance_fields(instances, fields)}
        self.shard = choose_shard(shard)

    def run(self) -> RunReport:
        """Embed the slides and print the summary.

        Raises:
            TableError: when the slide table is malformed.
            CheckpointError: when the encoder cannot be loaded.
        """
        records = read_slide_table(self.slides)
        encoder, meta = open_encoder(self.encoder, self.weights, self.options.get("device", "cpu"))
        encoder.scales = 2 if self.two_scales else 1
        paths, name = (self.index_dir, self.output_dir), str(meta["name"])
        report = embed_slides(records, *paths, encoder, name, inferer=self.inferer, shard=self.shard, **self.options)
        print(report.summary(), flush=True)
        return report
