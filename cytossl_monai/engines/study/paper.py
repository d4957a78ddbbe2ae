"""The paper's comparisons: what each part adds (table 2), other methods with and without (table 3), seeds paired."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cytossl_monai.engines.study.ablation import AblationRun, AblationStudy
from cytossl_monai.engines.study.representation import FIGURES
from cytossl_monai.engines.study.seeds import paired_over_seeds
from cytossl_monai.utils.errors import InputError
from cytossl_monai.utils.files import read_yaml

__all__ = ["PaperStudy", "paper_table", "read_paper_study"]

_KEYS = {"bundle", "overlays", "settings", "scales", "seeds", "arms", "tables", "tasks"}


def read_paper_study(path: str | os.PathLike[str], scale: str = "small") -> dict[str, Any]:
    """Read the description of the study (YAML) at one scale.

    Args:
        path: the file.
        scale: key of its section ``scales``, whose settings are laid over all others'; it may name some of the
            ``tasks`` alone. Its own ``slides`` are laid over those of the section ``slides``, of the slide-level
            tables, which may be absent.

    Raises:
        InputError: when it does not exist, a section is missing or unknown, or the scale is.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"study {path} does not exist; copy configs/study/paper.yaml and adapt it")
    content = read_yaml(path, "look at configs/study/paper.yaml")
    sections = set(content) if isinstance(content, dict) else set()
    if sections - {"slides"} != _KEYS:
        wrong = ", ".join(sorted((sections - {"slides"}) ^ _KEYS))
        raise InputError(f"study {path} must have the sections {', '.join(sorted(_KEYS))}; look at {wrong}")
    if scale not in content["scales"]:
        raise InputError(f"study {path} has no scale {scale!r}; it has {', '.join(content['scales'])}")
    chosen = content["scales"][scale] or {}
    tasks = chosen.get("tasks") or list(content["tasks"])
    return {
        **content,
        "tasks": {name: task for name, task in content["tasks"].items() if name in tasks},
        "overlays": [*content["overlays"], *chosen.get("overlays", ())],
        "settings": {**content["settings"], **(chosen.get("settings") or {})},
        "scale_arms": chosen.get("arms") or {},
        "slides": {**(content.get("slides") or {}), **(chosen.get("slides") or {})},
    }


class PaperStudy(AblationStudy):
    """Every arm with every seed: the same seed means the same data, in the same order, from the same weights.

    A run's folder is ``<output>/<arm>/seed<n>``; what is finished is not done again, what was killed goes on.

    Args:
        study: what :func:`read_paper_study` gives; else as :class:`AblationStudy`.
        data: see :class:`AblationStudy`.
        output: see :class:`AblationStudy`.
        root: see :class:`AblationStudy`.
        extra: see :class:`AblationStudy`.
    """

    def runs(self, methods: Sequence[str] | None = None, arms: Sequence[str] | None = None) -> list[AblationRun]:
        """The runs, seed by seed, so that a study that is stopped has whole pairs.

        Args:
            methods: names of arms of the study; None: all.
            arms: seeds as ``"seed0"``; None: all.

        Raises:
            InputError: for an arm that the study does not name, or a missing configuration.
        """
        known = self.study["arms"]
        unknown = [name for name in methods or () if name not in known]
        if unknown:
            raise InputError(f"unknown {', '.join(unknown)}; this study has {', '.join(known)}")
        seeds = [seed for seed in self.study["seeds"] if not arms or f"seed{seed}" in arms]
        return [self._arm(name, seed) for seed in seeds for name in known if not methods or name in methods]

    def _arm(self, name: str, seed: int) -> AblationRun:
        own = self.study["arms"][name] or {}
        files = [self.root / file for file in (self.study["bundle"], *own.get("overlays", ()), *self.study["overlays"])]
        for file in files:
            if not file.is_file():
                raise InputError(f"configuration {file} of the study does not exist; paths are relative to {self.root}")
        scaled = self.study["scale_arms"].get(name) or {}
        settings = {**self.study["settings"], **(own.get("settings") or {}), **scaled, "seed": seed}
        return AblationRun(name, f"seed{seed}", tuple(map(str, files)), {**settings, **self.extra})


def paper_table(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: for each of the study's tables and tasks the paper's figures beside ours.

    Args:
        study: what :func:`read_paper_study` gives: ``tables`` names of each its ``base``, ``arms`` (name -> the paper's
            figures as text) and what ``paper`` measured.
        rows: of :meth:`AblationStudy.evaluate`.

    Returns:
        One line an arm: the paper's figures, ours as mean over the seeds, and the gain over the base with its interval.
    """
    lines: list[str] = []
    for title, table in study["tables"].items():
        for task in dict.fromkeys(str(row["task"]) for row in rows):
            mine = [row for row in rows if row["task"] == task]
            heads = [f"{name}, gain (95 %)" for name in FIGURES.values()]
            lines += [
                f"**{title}**, ours on `{task}`",
                "",
                f"| arm | paper: {table['paper']} | seeds | {' | '.join(heads)} |",
            ]
            lines.append("|---" * (len(heads) + 3) + "|")
            for arm, published in table["arms"].items():
                own = [row for row in mine if row["method"] == arm]
                base = table.get("bases", {}).get(arm, table["base"])
                cells = []
                for figure in FIGURES:
                    mean = f"{np.mean([row[figure] for row in own]):.3f}" if own else "not run"
                    gain, low, high, pairs = paired_over_seeds(mine, arm, base, task, figure)
                    interval = f"{low:+.3f} to {high:+.3f}" if pairs > 1 else "one pair: no interval"
                    cells.append(mean if arm == base or not pairs else f"{mean}, {gain:+.3f} ({interval})")
                lines.append(f"| {arm} | {published} | {len(own)} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)
