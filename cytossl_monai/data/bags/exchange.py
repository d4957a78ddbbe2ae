"""Feature files in the folders and forms that CLAM and TRIDENT read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from cytossl_monai.data.bags.features import Features, read_features
from cytossl_monai.utils.errors import FeatureError, InputError, failure
from cytossl_monai.utils.files import atomic_path
from cytossl_monai.utils.report import RunReport

__all__ = ["LAYOUTS", "FeatureExporter", "export_clam", "export_trident"]

LAYOUTS = ("clam", "trident")
_MAGNIFICATIONS = (80, 60, 40, 20, 10, 5)
_UM_TIMES = 10.0  # micrometres per pixel times magnification


def export_clam(features: Features, slide_id: str, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a slide's features as CLAM's data set reads them.

    Args:
        features: as `read_features` gives them.
        slide_id: as CLAM's table names the slide.
        folder: CLAM's ``data_dir``; gets ``pt_files/<slide_id>.pt`` (a float32 tensor (N, D)) and
            ``h5_files/<slide_id>.h5`` (``features`` float32 and ``coords`` int32, which grow along N).

    Returns:
        the two files.
    """
    tensor_file, table_file = (Path(folder) / f"{kind}_files" / f"{slide_id}.{kind}" for kind in ("pt", "h5"))
    for path in (tensor_file, table_file):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(tensor_file) as partial:
        torch.save(torch.from_numpy(np.ascontiguousarray(features.features, dtype=np.float32)), partial)
    with atomic_path(table_file) as partial, h5py.File(partial, "w") as file:
        _grows(file, "features", features.features.astype(np.float32))
        _grows(file, "coords", features.coords.astype(np.int32))
    return tensor_file, table_file


def export_trident(features: Features, slide_id: str, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a slide's features and coordinates as TRIDENT's slide encoders and extractors read them.

    Args:
        features: as `read_features` gives them, with ``patch_size`` and ``patch_size_level0``.
        slide_id: used where the features do not name their slide's file, by which TRIDENT calls a slide.
        folder: TRIDENT's folder of one set of coordinates; gets ``features_<encoder>/<name>.h5`` and
            ``patches/<name>_patches.h5``.

    Returns:
        the two files.

    Raises:
        FeatureError: where the features do not say how large their tiles are.
    """
    attrs = features.attrs
    lacking = [name for name in ("patch_size", "patch_size_level0", "level0_mpp") if name not in attrs]
    if lacking:
        raise FeatureError(f"the features of {slide_id} do not say {', '.join(lacking)}, which TRIDENT reads")
    name = Path(str(attrs.get("slide_path") or slide_id)).stem
    encoder = re.sub(r"[^A-Za-z0-9.+-]+", "_", str(attrs.get("encoder_name") or "encoder"))
    scale = float(attrs["level0_mpp"])
    target = scale * int(attrs["patch_size_level0"]) / int(attrs["patch_size"])
    coords_attrs: dict[str, Any] = {
        "patch_size": int(attrs["patch_size"]),
        "patch_size_level0": int(attrs["patch_size_level0"]),
        "level0_magnification": _magnification(scale),
        "target_magnification": _magnification(target),
        "overlap": int(attrs.get("overlap", 0)),
        "name": name,
        "savetodir": str(folder),
    }
    for side in ("level0_width", "level0_height"):
        if side in attrs:
            coords_attrs[side] = int(attrs[side])
    feature_file = Path(folder) / f"features_{encoder}" / f"{name}.h5"
    coords_file = Path(folder) / "patches" / f"{name}_patches.h5"
    for path in (feature_file, coords_file):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial, h5py.File(partial, "w") as file:
            if path is feature_file:
                data = _grows(file, "features", features.features.astype(np.float32))
                data.attrs.update({"name": name, "savetodir": str(path.parent), "encoder": encoder})
            _grows(file, "coords", features.coords.astype(np.int64)).attrs.update(coords_attrs)
    return feature_file, coords_file


def _grows(file: h5py.File, name: str, values: np.ndarray) -> h5py.Dataset:
    """A data set that both tools append to: chunked, without a bound along the first axis."""
    chunks = (min(32, max(1, len(values))), *values.shape[1:])
    return file.create_dataset(name, data=values, maxshape=(None, *values.shape[1:]), chunks=chunks)


def _magnification(mpp: float) -> int:
    """The magnification that a resolution is called by: 40 for 0.25 um/px."""
    return min(_MAGNIFICATIONS, key=lambda known: abs(np.log(known * mpp / _UM_TIMES)))


class FeatureExporter:
    """What the configuration ``export_features.json`` runs: our feature files in, another tool's out.

    Args:
        features_dir: folder of ``<slide_id>.h5``.
        output_dir: folder to write to.
        layout: ``clam`` or ``trident``.

    Raises:
        ValueError: for another layout.
    """

    def __init__(
        self, features_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str], layout: str = "clam"
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}.")
        self.features_dir, self.output_dir, self.layout = Path(features_dir), Path(output_dir), layout

    def run(self) -> RunReport:
        """Export every feature file and print the summary; one that fails is reported, the others go on.

        Raises:
            FeatureError: when the folder holds no feature file.
        """
        files = sorted(self.features_dir.glob("*.h5"))
        if not files:
            raise FeatureError(f"{self.features_dir} holds no feature file; embed the slides first")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        report = RunReport("export features", self.output_dir / "report.csv")
        export = export_clam if self.layout == "clam" else export_trident
        for path in files:
            try:
                features = read_features(path)
                export(features, str(features.attrs.get("slide_id") or path.stem), self.output_dir)
            except (InputError, OSError) as error:
                report.add(path.stem, "failed", failure(error))
                continue
            report.add(path.stem, "done", f"{len(features)} tiles")
        report.save()
        print(report.summary(), flush=True)
        return report
