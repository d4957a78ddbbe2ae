"""Method x {plain, +NCP, +SR, +both} at equal steps: trained through the pretraining bundle, judged by probes."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import logging
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cytossl_monai.data.tiles.labelled import LabelledImages
from cytossl_monai.engines.bundle import run_training
from cytossl_monai.engines.settings.check import check_training
from cytossl_monai.engines.study.representation import encode, figures_of, labelled_task, probe
from cytossl_monai.metrics.logged import read_log
from cytossl_monai.networks.files import build_encoder, load_encoder
from cytossl_monai.utils.errors import InputError
from cytossl_monai.utils.files import read_json, read_torch, read_yaml, write_json

__all__ = ["ARMS", "AblationRun", "AblationStudy", "read_study"]

logger = logging.getLogger(__name__)

ARMS = {"plain": (False, False), "ncp": (True, False), "sr": (False, True), "both": (True, True)}
"""Name of an arm -> (NCP, SR)."""
_KEYS = {"bundle", "overlays", "settings", "seeds", "switches", "methods", "tasks"}


@dataclass(frozen=True)
class AblationRun:
    """One training run of a study.

    Args:
        method: name of the method.
        arm: key of ``ARMS``.
        config_files: configurations of the bundle, later ones over earlier ones.
        settings: keys of the bundle that are set over all of them; ``#`` goes into a section.
    """

    method: str
    arm: str
    config_files: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``<method>/<arm>``, also the folder of the run."""
        return f"{self.method}/{self.arm}"

    def fingerprint(self) -> str:
        """Digest of everything that decides what the run computes: settings and contents of the configurations."""
        digest = hashlib.sha256(json.dumps(dict(self.settings), sort_keys=True).encode())
        for file in self.config_files:
            digest.update(Path(file).read_bytes())
        return digest.hexdigest()[:16]


def read_study(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the description of a study (YAML or JSON).

    Raises:
        InputError: when it does not exist, or a section is missing or unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"study {path} does not exist; copy configs/study/ablation.yaml and adapt it")
    content = read_yaml(path, "look at configs/study/ablation.yaml")
    sections = set(content) if isinstance(content, dict) else set()
    if sections != _KEYS:
        wrong = ", ".join(sorted(sections ^ _KEYS))
        raise InputError(f"study {path} must have the sections {', '.join(sorted(_KEYS))}; look at {wrong}")
    return dict(content)


class AblationStudy:
    """Trains what is not trained yet, evaluates what is not evaluated yet, and gathers the rows.

    A run's folder ``<output>/<method>/<arm>`` holds what the bundle writes, ``run.json`` (what it was made from) and,
    when it has been evaluated, ``result.json``. A run that was killed goes on from its last checkpoint.

    Args:
        study: what ``read_study`` gives. ``bundle``, ``overlays``: configurations of all runs, relative to ``root``.
            ``settings``: keys of the bundle, for all runs, ``seed`` too; ``seeds`` are for who makes one study of
            each. ``switches``: ``{"ncp": {"off": settings, "on": settings},
            "sr": ...}``. ``methods``: ``{name: {"overlays": [...], "settings": {...}, "switches": {...}}}``, the last
            where NCP or SR mean something of their own to a method. ``tasks``: arguments of ``labelled_task`` by name,
            with ``source`` relative to ``data``.
        data: folder of the data; the bundle's settings know it as ``@data_root``.
        output: folder to write to.
        root: folder that the study's configurations are relative to.
        extra: settings laid over all others, such as ``{"steps": 20}``.

    Raises:
        InputError: for a configuration that does not exist.
    """

    def __init__(
        self,
        study: Mapping[str, Any],
        data: str | os.PathLike[str],
        output: str | os.PathLike[str],
        root: str | os.PathLike[str] = ".",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.study, self.data, self.output = study, Path(data).resolve(), Path(output).resolve()
        self.root, self.extra = Path(root).resolve(), dict(extra or {})

    def runs(self, methods: Sequence[str] | None = None, arms: Sequence[str] | None = None) -> list[AblationRun]:
        """The runs of these methods and arms (default: all), in the order of the study.

        Raises:
            InputError: for a method that the study does not name, an unknown arm, or a missing configuration.
        """
        known = self.study["methods"]
        for names, allowed in ((methods, known), (arms, ARMS)):
            unknown = [name for name in names or () if name not in allowed]
            if unknown:
                raise InputError(f"unknown {', '.join(unknown)}; this study has {', '.join(allowed)}")
        return [
            self._run(method, arm) for method in known if not methods or method in methods for arm in arms or list(ARMS)
        ]

    def _run(self, method: str, arm: str) -> AblationRun:
        own = self.study["methods"][method] or {}
        files = [self.root / name for name in (self.study["bundle"], *self.study["overlays"], *own.get("overlays", ()))]
        for file in files:
            if not file.is_file():
                raise InputError(f"configuration {file} of the study does not exist; paths are relative to {self.root}")
        settings = {**self.study["settings"], **own.get("settings", {})}
        for switch, is_on in zip(("ncp", "sr"), ARMS[arm]):
            position = "on" if is_on else "off"
            switches = own.get("switches", {}).get(switch) or self.study["switches"][switch]
            settings.update(switches.get(position) or {})
        settings |= self.extra
        # The study's data_root is not a key of the bundle; its expressions refer to it.
        check_training(files, {"data_root": str(self.data), **settings}, "cytossl_pretrain/train", ("output_dir",))
        return AblationRun(method, arm, tuple(map(str, files)), settings)

    @property
    def tasks(self) -> list[LabelledImages]:
        """The labelled images, read at the first use; studies of other seeds share them."""
        return _read_tasks(json.dumps(self.study["tasks"]), self.data)

    def folder(self, run: AblationRun) -> Path:
        """Where a run writes."""
        return self.output / run.method / run.arm

    def train(self, run: AblationRun) -> Path:
        """Train a run, or what is left of it.

        Returns:
            its encoder's file.

        Raises:
            InputError: when the folder holds a run of other settings.
        """
        folder = self.folder(run)
        made_from, model = folder / "run.json", folder / "models" / "model.pt"
        if made_from.is_file():
            kept = read_json(made_from, "delete it to do the run again")
            before = kept.get("fingerprint") if isinstance(kept, dict) else None
            if before != run.fingerprint():
                raise InputError(f"{folder} holds a run with other settings; delete it or give another output folder")
        else:
            write_json(made_from, {"fingerprint": run.fingerprint(), "settings": dict(run.settings)})
        # A run that lost its curves is started again: it finds itself finished, and writes what is missing.
        if model.is_file() and ((folder / "curves.png").is_file() or not (folder / "log.csv").is_file()):
            return model
        logger.info("Training %s.", run.name)
        run_training(run.config_files, run.settings, {"output_dir": str(folder), "data_root": str(self.data)})
        gc.collect()  # an engine and its handlers refer to each other: without this, every run's memory would stay
        return model

    def evaluate(self, run: AblationRun, device: torch.device | str = "cpu") -> list[dict[str, Any]]:
        """Rows of a trained run: one a task; see ``rows``."""
        result = self.folder(run) / "result.json"
        if result.is_file():
            kept = read_json(result, "delete it to evaluate the run again")
            if isinstance(kept, dict) and kept.get("tasks") == json.loads(json.dumps(self.study["tasks"])):
                return list(kept["rows"])
        encoder, meta = load_encoder(self.folder(run) / "models" / "model.pt")
        rows = self._probe(encoder, {"method": run.method, "arm": run.arm, "steps": meta["steps"]}, device)
        for row in rows:
            row.update(_speed(self.folder(run) / "log.csv"))
        write_json(result, {"tasks": self.study["tasks"], "rows": rows})
        return rows

    def _probe(self, encoder: Any, head: dict[str, Any], device: torch.device | str) -> list[dict[str, Any]]:
        rows = []
        for task in self.tasks:
            row = {**head, "task": task.name, "images": len(task.labels), "classes": len(task.classes)}
            row.update(figures_of(probe(encode(encoder, task.images, device), task)))
            rows.append(row)
        return rows

    def rows(
        self,
        methods: Sequence[str] | None = None,
        arms: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> list[dict[str, Any]]:
        """Train and evaluate whatever is missing.

        Returns:
            one row a run and task: ``method, arm, steps, task, images, classes``, and ``knn``, ``linear_probe``
            (balanced accuracy, mean of the folds) and the same with ``_auc`` (macro AUC), each with ``_low`` and
            ``_high`` (95 %) and ``_folds``, ``images_per_s`` and
            ``data_wait_share`` (medians over the run's log; None where it logged none).
        """
        rows = []
        for run in self.runs(methods, arms):
            self.train(run)
            rows += self.evaluate(run, device)
        return rows

    def untrained_rows(self, runs: Sequence[AblationRun], device: torch.device | str = "cpu") -> list[dict[str, Any]]:
        """The same probes on random weights, without and with SR: what no training at all gives."""
        rows = []
        for arm in ("plain", "sr"):
            run = next((run for run in runs if run.arm == arm), None)
            if run is None:
                continue
            saved = read_torch(self.folder(run) / "models" / "model.pt", "an encoder")
            torch.manual_seed(int(run.settings.get("seed", 0)))
            rows += self._probe(build_encoder(saved), {"method": "random weights", "arm": arm, "steps": 0}, device)
        return rows


@functools.lru_cache(maxsize=1)
def _read_tasks(described: str, data: Path) -> list[LabelledImages]:
    """Tasks of a study's JSON."""
    return [
        labelled_task(name, **{**settings, "source": data / settings["source"]})
        for name, settings in json.loads(described).items()
    ]


def _speed(log: Path) -> dict[str, float | None]:
    """Medians of the throughput that a run logged."""
    figures = {}
    for wanted in ("images_per_s", "data_wait_share"):
        values = [value for _, _, name, value in read_log(log) if name == wanted]
        figures[wanted] = statistics.median(values) if values else None
    return figures
