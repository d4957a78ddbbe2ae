"""The table of an ablation: CSV for machines, Markdown for pages, PNG for the eye."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cytossl_monai.engines.study.representation import FIGURES, difference
from cytossl_monai.engines.study.seeds import mean_over_seeds, paired_over_seeds
from cytossl_monai.utils.cells import plain_cell
from cytossl_monai.utils.files import atomic_path, write_text

__all__ = ["markdown_table", "write_table"]

LABELS = {"plain": "plain", "ncp": "+NCP", "sr": "+SR", "both": "+both"}
COLOURS = {"plain": "#8a8f98", "ncp": "#d9822b", "sr": "#2f7dbd", "both": "#3f9142"}


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a method and arm, the tasks side by side: each figure with its 95 % interval, and images/s.

    Below it, what each arm gains over the plain one of its method: differences paired over the folds. Of several seeds
    the figures are means, and both intervals are Student's t over the seeds.

    Args:
        rows: what ``AblationStudy.rows`` gives, each with its ``seed`` where there are several.
    """
    gains = _gains(rows, *_tasks_and_columns(rows))
    rows = _shown(rows)
    tasks, columns = _tasks_and_columns(rows)
    lines = [
        "| method | arm | " + " | ".join(columns) + " | images/s |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for method, arm in dict.fromkeys((row["method"], row["arm"]) for row in rows):
        mine = {row["task"]: row for row in rows if (row["method"], row["arm"]) == (method, arm)}
        cells = [_interval(mine.get(task), figure) for task in tasks for figure in FIGURES]
        speed = next(iter(mine.values())).get("images_per_s")
        lines.append(f"| {method} | {LABELS[arm]} | {' | '.join(cells)} | {'' if speed is None else f'{speed:.0f}'} |")
    return "\n".join([*lines, *gains]) + "\n"


def _tasks_and_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return tasks, [f"{task}: {label}" for task in tasks for label in FIGURES.values()]


def _shown(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The rows as they are, or their means over the seeds."""
    return mean_over_seeds(rows) if _seeds(rows) > 1 else rows


def _seeds(rows: Sequence[Mapping[str, Any]]) -> int:
    return len({row.get("seed") for row in rows})


def _gain(rows: Sequence[Mapping[str, Any]], method: str, arm: str, task: str, figure: str) -> str:
    """What an arm gains over the plain one of its method, paired over the seeds, or over the folds of the only one."""
    mine = [row for row in rows if (row["method"], row["task"]) == (method, task)]
    if _seeds(rows) > 1:
        by_seed = [{**row, "method": row["arm"], "arm": row["seed"]} for row in mine]
        mean, low, high, pairs = paired_over_seeds(by_seed, arm, "plain", task, figure)
        if pairs < 2:
            return f"{mean:+.3f} (one pair: no interval)" if pairs else ""
        return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    by_arm = {row["arm"]: row for row in mine}
    if arm not in by_arm or "plain" not in by_arm:
        return ""
    gain = difference(by_arm[arm], by_arm["plain"], figure)
    return f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"


def _gains(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Lines of what each arm gains over the plain one; none where no method has both."""
    methods = {row["method"] for row in rows if row["arm"] == "plain"}
    lines = []
    for method, arm in dict.fromkeys((row["method"], row["arm"]) for row in rows):
        if arm == "plain" or method not in methods:
            continue
        cells = [_gain(rows, method, arm, task, figure) for task in tasks for figure in FIGURES]
        lines.append(f"| {method} | {LABELS[arm]} | {' | '.join(cells)} |")
    if not lines:
        return []
    paired = "seeds" if _seeds(rows) > 1 else "folds"
    head = ["", f"Less the plain arm, paired over the {paired}:", "", "| method | arm | " + " | ".join(columns) + " |"]
    return [*head, "|---" * (len(columns) + 2) + "|", *lines]


def _interval(row: Mapping[str, Any] | None, figure: str) -> str:
    if row is None:
        return ""
    if np.isnan(row[f"{figure}_low"]):
        return f"{row[figure]:.3f} (one seed)"
    return f"{row[figure]:.3f} ({row[f'{figure}_low']:.3f} to {row[f'{figure}_high']:.3f})"


def write_table(rows: Sequence[Mapping[str, Any]], folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``ablation.csv``, ``ablation.md`` and ``ablation.png``.

    Args:
        rows: what ``AblationStudy.rows`` gives, at least one; of several seeds each with its ``seed``.
        folder: where to.

    Returns:
        the three files.
    """
    paths = [Path(folder) / f"ablation.{suffix}" for suffix in ("csv", "md", "png")]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_path(paths[0]) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows({name: plain_cell(value) for name, value in row.items()} for row in rows)
    write_text(paths[1], markdown_table(rows))
    _draw(rows, paths[2])
    return paths


def _draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the arms beside each other, one panel a task and figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    rows = _shown(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    picture = Figure(figsize=(1.5 + 1.3 * len(methods) * len(FIGURES), 3.0 * len(tasks)), layout="constrained")
    FigureCanvasAgg(picture)
    panels = picture.subplots(len(tasks), len(FIGURES), squeeze=False)
    for task, line in zip(tasks, panels):
        for figure, axes in zip(FIGURES, line):
            for number, (arm, label) in enumerate(LABELS.items()):
                chosen = [row for row in rows if row["task"] == task and row["arm"] == arm]
                if not chosen:
                    continue
                places = [methods.index(row["method"]) + 0.2 * (number - 1.5) for row in chosen]
                means = [row[figure] for row in chosen]
                below = [row[figure] - row[f"{figure}_low"] for row in chosen]
                above = [row[f"{figure}_high"] - row[figure] for row in chosen]
                axes.bar(places, means, 0.19, yerr=[below, above], capsize=2, color=COLOURS[arm], label=label)
            axes.set_xticks(range(len(methods)), methods, fontsize=8)
            axes.set_title(f"{task}: {FIGURES[figure]}", fontsize=10)
            axes.set_ylabel("AUC" if figure.endswith("auc") else "balanced accuracy", fontsize=8)
            axes.tick_params(axis="y", labelsize=8)
            axes.grid(axis="y", alpha=0.3)
    panels[0][0].legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.12))
    with atomic_path(path) as partial:
        picture.savefig(partial, dpi=110, format="png")
