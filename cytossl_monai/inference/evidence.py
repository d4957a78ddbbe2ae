"""The prediction of a slide and everything that shows why, as files in a folder of its own."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from monai.transforms import Transform
from torch import nn

import cytossl_monai
from cytossl_monai.data.slides.open import open_slide
from cytossl_monai.data.slides.slide import Slide
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.inference.classify import SlideClassifier, SlidePrediction
from cytossl_monai.inference.instances import damage_in_words, index_hash
from cytossl_monai.networks.describe import describe_network
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash_0_1
from cytossl_monai.utils.errors import CheckpointError, FeatureError
from cytossl_monai.utils.files import atomic_path, file_fingerprint, write_json
from cytossl_monai.visualize.attention_heads import class_attention, draw_attention_heads
from cytossl_monai.visualize.gallery import GalleryTile, draw_gallery, read_gallery
from cytossl_monai.visualize.geojson import feature_collection, write_geojson
from cytossl_monai.visualize.heatmap import TileMap, tile_map, write_heatmap_tiff
from cytossl_monai.visualize.nifti import write_nifti
from cytossl_monai.visualize.overlay import draw_overlay
from cytossl_monai.visualize.report_page import NOTICE, SlideReport, kind_of, write_preview, write_report

__all__ = ["EVIDENCE", "USUAL", "VERSION", "SlideEvidence"]

VERSION = 1
"""Changes with every change of what the files say: slides of an older version are written again."""

EVIDENCE = {
    "tiles": "tiles.parquet",
    "overlay": "overlay.png",
    "heatmap": "heatmap.tif",
    "nifti": "heatmap.nii.gz",
    "geojson": "tiles.geojson",
    "gallery": "gallery.png",
    "report": "report.html",
    "heads": "attention_heads.png",
}
"""What can be asked for, and the files."""

USUAL = tuple(name for name in EVIDENCE if name != "heads")
_HEAD_TILES = 6

_PREVIEW = "preview.jpg"


class SlideEvidence(Transform):
    """Classify a slide from its features and write prediction and evidence to ``output_dir/<slide_id>/``.

    ``prediction.json`` is written last: where it is and agrees with slide, index, encoder, classifier and settings, all
    the others are whole and current. A slide without cells gets a ``prediction.json`` without a label and a report that
    says so: never a diagnosis.

    Args:
        classifier: classifier file of `save_classifier`, or several (folds): their probabilities are averaged.
        output_dir: folder of the slides' folders.
        files: which of ``EVIDENCE`` to write; ``prediction.json`` always is. ``heads``, not among the usual ones, shows
            what attention heads of the encoder look at, on the leading tiles; for encoders with a class token.
        top_tiles: tiles in gallery and report.
        overview_size: longer side of the slide's picture in the report, pixels.
        negative_class: class that means "nothing suspicious"; None finds it by its name (see `SlideClassifier`).
        prevalence: share of each class where the slides come from; None: those the classifier was trained for.
        device: where to classify.

    Raises:
        ValueError: for a name that is not in ``EVIDENCE``.
    """

    def __init__(
        self,
        classifier: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        output_dir: str | os.PathLike[str],
        files: Sequence[str] = USUAL,
        top_tiles: int = 20,
        overview_size: int = 3000,
        negative_class: str | None = None,
        prevalence: Sequence[float] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        unknown = [name for name in files if name not in EVIDENCE]
        if unknown:
            raise ValueError(f"evidence {unknown[0]!r} is unknown; choose among {', '.join(EVIDENCE)}")
        if top_tiles < 1 or overview_size < 256:
            raise ValueError(f"top_tiles ({top_tiles}) must be >= 1 and overview_size ({overview_size}) >= 256")
        self.paths, self.output_dir = classifier, Path(output_dir)
        self.files, self.top_tiles, self.overview_size = list(files), top_tiles, overview_size
        self.negative_class, self.prevalence, self.device = negative_class, prevalence, device
        self.classifier: SlideClassifier | None = None
        self.encoder: dict[str, Any] = {}
        self._hash = ""
        self._network: nn.Module | None = None

    def prepare(self, encoder: nn.Module, encoder_hash: str) -> None:
        """Load the classifier and hold it against the encoder, before the first slide.

        Raises:
            CheckpointError: when the classifier cannot be loaded or was trained on another encoder.
        """
        self.classifier = SlideClassifier(self.paths, self.device, self.negative_class, self.prevalence)
        self._hash = self.classifier.hash
        self._network = encoder
        meta = getattr(encoder, "meta", {}) or {}
        self.encoder = {
            "name": str(meta.get("name") or Path(getattr(encoder, "source", "encoder")).stem),
            "hash": encoder_hash,
            "file": getattr(encoder, "source", None),
            "architecture": describe_network(getattr(encoder, "network", encoder)),
        }
        if meta.get("method"):
            self.encoder["method"] = str(meta["method"])
        if meta.get("license"):
            self.encoder["license"] = str(meta["license"])
        if meta.get("commercial") is False:
            self.encoder["commercial"] = False
        known = self.classifier.encoder
        fits = {None, encoder_hash} | ({encoder_hash_0_1(encoder)} if isinstance(encoder, Encoder) else set())
        if known["hash"] not in fits:
            raise CheckpointError(
                f"classifier {self.classifier.files[0]} was trained on the encoder {known['name'] or ''} "
                f"({known['hash']}), not on {self.encoder['file']} ({encoder_hash}); give the encoder that belongs to "
                "it"
            )

    def identity(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """What a prediction must agree in to be still the right one."""
        record = item["record"]
        return {
            "version": VERSION,
            "slide": file_fingerprint(record.path),
            "index": index_hash(item["index"]) if "index" in item else None,
            "encoder": self.encoder["hash"],
            "classifier": self._hash,
            "settings": [self.top_tiles, self.overview_size, self.negative_class, self.prevalence],
        }

    def current(self, item: Mapping[str, Any]) -> str | None:
        """A message where the slide's folder is whole and made from the same things, else None."""
        folder = self.output_dir / item["slide_id"]
        try:
            answer = json.loads((folder / "prediction.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(answer, dict) or answer.get("made_from") != self.identity(item):
            return None
        if not all((folder / EVIDENCE[name]).is_file() for name in self.files):
            return None
        return _message(answer)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Classify one slide and write its files.

        Args:
            data: item with ``record``, ``index``, ``features``, ``encoder``; or with ``problem``.

        Returns:
            the item with ``prediction`` (`SlidePrediction`; absent without cells), ``answer`` (the content of
            prediction.json) and ``message``.

        Raises:
            FeatureError: when the features do not suit the classifier.
            SlideError: when the slide can no longer be read.
            OSError: when a file cannot be written.
        """
        item = dict(data)
        folder = self.output_dir / item["slide_id"]
        status, why = item.get("problem", ("done", ""))
        if status == "failed":
            return item  # what an earlier run wrote about the slide stays: it may be out of reach for a moment only
        (folder / "prediction.json").unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        if status == "empty":
            answer = self._write_empty(folder, item, why)
        else:
            answer = self._write_found(folder, item)
        write_json(folder / "prediction.json", answer)
        item["answer"], item["message"] = answer, _message(answer)
        return item

    # -- a slide with cells ---------------------------------------------------------------------------------------

    def _write_found(self, folder: Path, item: dict[str, Any]) -> dict[str, Any]:
        if self.classifier is None:
            raise FeatureError("the classifier is not loaded; call prepare first")
        record, index = item["record"], item["index"]
        features = item["features"]
        if len(features) != len(index):
            raise FeatureError(
                f"{item['slide_id']} has {len(features)} features for {len(index)} tiles; embed it again"
            )
        prediction = self.classifier.predict(features, item["encoder"], str(record.path))
        item["prediction"] = prediction
        order = np.argsort(-prediction.evidence, kind="stable")
        top = order[: self.top_tiles]
        with open_slide(record.path, mpp=record.mpp, local=record.local) as slide:
            size = int(index.table["size"].iloc[0])
            heat = tile_map(index.coords, prediction.shown, size, slide.width, slide.height, slide.mpp)
            answer = {**self._facts(item, slide, index), **self._answer(prediction)}
            pictured = self._wants("gallery", "report", "geojson")
            tiles = read_gallery(slide, index, prediction.attention, prediction.score, top) if pictured else []
            thumbnail = slide.thumbnail(self.overview_size) if self._wants("overlay", "report") else None
            self._write(folder, item, answer, heat, tiles, thumbnail, order)
            if self._wants("heads"):
                self._draw_heads(folder / EVIDENCE["heads"], slide, index, order[:_HEAD_TILES])
        return answer

    def _draw_heads(self, path: Path, slide: Slide, index: TileIndex, rows: np.ndarray) -> None:
        """The leading tiles, and what the first three heads of the encoder's last layer look at there."""
        assert self._network is not None
        tiles = np.asarray(slide.read_regions(index.coords[rows], index.tile_size, mpp=index.mpp))
        device = next(self._network.parameters()).device
        attention = class_attention(self._network, torch.from_numpy(tiles).to(device)).cpu().numpy()
        draw_attention_heads(path, tiles, {"heads 1 to 3": attention}, list(range(min(3, attention.shape[1]))))

    def _wants(self, *names: str) -> bool:
        return any(name in self.files for name in names)

    def _write(
        self,
        folder: Path,
        item: Mapping[str, Any],
        answer: dict[str, Any],
        heat: TileMap,
        tiles: Sequence[GalleryTile],
        thumbnail: np.ndarray | None,
        order: np.ndarray,
    ) -> None:
        index, prediction = item["index"], item["prediction"]
        title = f"{item['slide_id']}: {prediction.label} ({prediction.suspicion:.2f})"
        if self._wants("tiles"):
            _write_tiles(folder / EVIDENCE["tiles"], index, prediction, order)
        if self._wants("heatmap"):
            write_heatmap_tiff(folder / EVIDENCE["heatmap"], heat)
        if self._wants("nifti"):
            write_nifti(folder / EVIDENCE["nifti"], heat)
        if self._wants("geojson"):
            measurements = {
                "Attention (1 is average)": prediction.attention * len(index),
                "Suspicion": prediction.score,
                "Evidence": prediction.evidence * len(index),
                "Nuclei": index.table["n_nuclei"].to_numpy(),
            }
            if index.meta.get("instances") == "nuclei":
                measurements["Nucleus area um^2"] = index.table["area_um2"].to_numpy()
                measurements["Nucleus density"] = index.table["density"].to_numpy()
            size = int(index.table["size"].iloc[0])
            collection = feature_collection(
                item["slide_id"],
                index.coords,
                size,
                prediction.shown,
                measurements,
                order[: len(tiles)],
                tiles,
                (answer["slide"]["bounds_offset"][0], answer["slide"]["bounds_offset"][1]),
                cells=index.meta.get("instances") == "nuclei",
            )
            write_geojson(folder / EVIDENCE["geojson"], collection)
        if self._wants("gallery"):
            draw_gallery(folder / EVIDENCE["gallery"], tiles, title, kind=kind_of(answer))
        if thumbnail is not None and self._wants("overlay"):
            draw_overlay(folder / EVIDENCE["overlay"], thumbnail, heat, title, "attention x suspicion")
        if thumbnail is not None and self._wants("report"):
            report = SlideReport(answer, thumbnail, heat, tiles, prediction.score, self._links())
            write_report(folder / EVIDENCE["report"], report)
            write_preview(folder / _PREVIEW, report)

    def _links(self) -> dict[str, str]:
        return {name: EVIDENCE[name] for name in self.files if name != "report"}

    # -- a slide without cells ------------------------------------------------------------------------------------

    def _write_empty(self, folder: Path, item: dict[str, Any], why: str) -> dict[str, Any]:
        record = item["record"]
        for name in EVIDENCE.values():
            (folder / name).unlink(missing_ok=True)
        with open_slide(record.path, mpp=record.mpp, local=record.local) as slide:
            answer = {
                **self._facts(item, slide, None),
                "status": "no_cells",
                "label": None,
                "suspicion": None,
                "probabilities": None,
                "reason": why,
            }
            if self._wants("report"):
                report = SlideReport(answer, slide.thumbnail(self.overview_size))
                write_report(folder / EVIDENCE["report"], report)
                write_preview(folder / _PREVIEW, report)
        return answer

    # -- what prediction.json says --------------------------------------------------------------------------------

    def _facts(self, item: Mapping[str, Any], slide: Slide, index: TileIndex | None) -> dict[str, Any]:
        record, times = item["record"], item.get("times")
        assert self.classifier is not None
        return {
            "slide_id": item["slide_id"],
            "patient_id": record.patient_id,
            "notice": NOTICE,
            "slide": {
                "path": str(record.path),
                "width": slide.width,
                "height": slide.height,
                "mpp": slide.mpp,
                "mpp_source": slide.mpp_source,
                "reader": slide.backend,
                "bounds_offset": list(slide.bounds_offset),
            },
            "tiles": {
                "count": 0 if index is None else len(index),
                "instances": "tiles" if index is None else index.meta.get("instances", "tiles"),
                "size_px": None if index is None else int(index.table["size"].iloc[0]),
                "mpp": None if index is None else index.mpp,
                "nuclei": 0 if index is None else int(index.table["n_nuclei"].sum()),
                "unreadable_fields": 0 if index is None else int(index.meta.get("unreadable_fields", 0)),
                "unreadable": 0 if index is None else int(index.meta.get("tiles", {}).get("unreadable", 0)),
            },
            "encoder": self.encoder,
            "classifier": {"hash": self._hash, "members": self.classifier.versions},
            "seen_in_training": self.classifier.has_seen(str(item["slide_id"]), record.patient_id),
            "software": {"cytossl_monai": cytossl_monai.__version__, "torch": torch.__version__},
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": {
                "index": round(item.get("index_seconds", 0.0), 2),
                "embed": round(times.total, 2) if times else 0.0,
                "encoder": round(times.encoder, 2) if times else 0.0,
            },
            "made_from": self.identity(item),
        }

    def _answer(self, prediction: SlidePrediction) -> dict[str, Any]:
        assert self.classifier is not None
        return {
            "status": "predicted",
            "label": prediction.label,
            "suspicion": prediction.suspicion,
            "suspicion_spread": prediction.spread,
            "probabilities": prediction.probabilities,
            "target": self.classifier.target,
            "negative_class": None
            if self.classifier.target == "multilabel"
            else self.classifier.classes[self.classifier.negative],
            "calibrated": self.classifier.calibrated,
            "has_attention": prediction.has_attention,
        }


def _write_tiles(path: Path, index: TileIndex, prediction: SlidePrediction, order: np.ndarray) -> Path:
    """The index's rows with attention, score, evidence and rank (1 is the strongest)."""
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    table = index.table.assign(
        attention=prediction.attention, score=prediction.score, evidence=prediction.evidence, rank=rank
    )
    with atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pandas(pd.DataFrame(table), preserve_index=False), partial, compression="zstd")
    return path


def _message(answer: Mapping[str, Any]) -> str:
    if answer.get("label") is None:
        return "no cells found"
    count, lost = f"{answer['tiles']['count']} {kind_of(answer)}s", answer["tiles"].get("unreadable_fields", 0)
    return f"{answer['label']}, suspicion {answer['suspicion']:.3f}, {count}{damage_in_words(lost)}"
