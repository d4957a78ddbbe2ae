"""Many shards' reports into one, and the pages of all slides once every shard is done."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.utils.cells import plain_cell, stored_cell
from cytossl_monai.utils.errors import ShardError, reason
from cytossl_monai.utils.files import atomic_path, read_json
from cytossl_monai.utils.report import ItemStatus, RunReport
from cytossl_monai.utils.shard import Shard, shard_reports
from cytossl_monai.visualize.cohort_page import write_cohort_page

__all__ = ["ShardMerger", "merge_shards"]

logger = logging.getLogger(__name__)


def merge_shards(
    slides: str | os.PathLike[str], output_dir: str | os.PathLike[str], partial: bool = False, title: str = "merge"
) -> RunReport:
    """Write ``report.csv`` from the reports of the shards; after inference, ``predictions.csv`` and ``index.html`` too.

    Nothing is computed anew: it can be run as often as wanted, also while shards are still at work (``partial``).

    Args:
        slides: the slide table that the shards worked on.
        output_dir: the folder that they wrote to (of index, embed or inference).
        partial: merge what there is; the slides of missing shards are listed as failed.
        title: for the summary line.

    Returns:
        the report, written as well, in the table's order.

    Raises:
        ShardError: when there are no reports of shards, some of several numbers of shards, or some are missing (unless
            ``partial``); it says which shards, and how many slides nobody has done.
        TableError: when the slide table is malformed.
    """
    folder = Path(output_dir)
    records = read_slide_table(slides)
    reports = shard_reports(folder / "report.csv")
    if not reports:
        raise ShardError(
            f"{folder} holds no report of a shard (report.1-of-n.csv); run the shards first, or give the folder that "
            "they wrote to"
        )
    counts = sorted({count for _, count in reports})
    if len(counts) > 1:
        raise ShardError(
            f"{folder} holds reports of {' and of '.join(map(str, counts))} shards; remove those of the run that does "
            "not count"
        )
    count = counts[0]
    missing = [index for index in range(1, count + 1) if (index, count) not in reports]
    lines = {item.item: item for _, path in reports.values() for item in _read_report(path)}
    undone = [record.slide_id for record in records if record.slide_id not in lines]
    if missing and not partial:
        names = ", ".join(f"{index}/{count}" for index in missing[:20]) + (" ..." if len(missing) > 20 else "")
        raise ShardError(
            f"{len(missing)} of {count} shards have no report in {folder} ({names}): {len(undone)} slides are not done "
            f"({_some(undone)}); run these shards, or merge what there is with --partial true"
        )
    report = RunReport(title, folder / "report.csv")
    for record in records:
        shard = Shard(Shard.of(record.slide_id, count), count)
        line = lines.get(record.slide_id)
        if line is None:
            why = f"no shard has done it; run shard {shard}"
            line = ItemStatus(record.slide_id, "failed", why)
        report.items.append(line)
    report.save()
    _write_pages(folder, report)
    return report


def _read_report(path: Path) -> list[ItemStatus]:
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
        if "item" not in (reader.fieldnames or ()):
            raise ValueError("without the column item")  # without rows it may be: a shard can be of no slide
        return [
            ItemStatus(stored_cell(r["item"]), r["status"], stored_cell(r["message"]), float(r["seconds"]))  # type: ignore[arg-type]
            for r in rows
        ]
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise ShardError(f"{path} is not a report of a shard ({reason(error)}); run that shard again") from error


def _write_pages(folder: Path, report: RunReport) -> None:
    """The list of slides, where the shards were of inference: then each slide has a ``prediction.json``."""
    failed = {item.item: item.message for item in report.items if item.status == "failed"}
    answers, lost = [], {}
    for item in report.items:
        path = folder / item.item / "prediction.json"
        if item.item in failed:
            continue
        if not path.is_file():
            lost[item.item] = f"{path} is gone; run its shard again"
            continue
        answers.append(read_json(path, "delete it and run its shard again", ShardError))
    if answers:
        write_predictions(folder / "predictions.csv", answers, {**failed, **lost})
        write_cohort_page(folder / "index.html", answers, {**failed, **lost})


def _some(names: Sequence[str], at_most: int = 5) -> str:
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


class ShardMerger:
    """What the configuration ``merge.json`` runs.

    Args:
        slides: as for `merge_shards`.
        output_dir: as for `merge_shards`.
        partial: as for `merge_shards`.
    """

    def __init__(
        self, slides: str | os.PathLike[str], output_dir: str | os.PathLike[str], partial: bool = False
    ) -> None:
        self.slides, self.output_dir, self.partial = slides, output_dir, partial

    def run(self) -> RunReport:
        """Merge, and print the summary.

        Raises:
            ShardError: as `merge_shards`.
        """
        report = merge_shards(self.slides, self.output_dir, self.partial)
        print(report.summary(), flush=True)
        return report


def write_predictions(path: Path, answers: Sequence[dict[str, Any]], failed: dict[str, str]) -> Path:
    """One line a slide, most suspicious first: ``slide_id, patient_id, status, label, suspicion, prob_<class>...``."""
    rows = [
        {
            "slide_id": a["slide_id"],
            "patient_id": a["patient_id"],
            "status": a["status"],
            "label": a["label"],
            "suspicion": a["suspicion"],
            **{f"prob_{name}": p for name, p in (a["probabilities"] or {}).items()},
        }
        for a in sorted(answers, key=lambda a: (a["label"] is None, -(a["suspicion"] or 0.0), a["slide_id"]))
    ]
    rows += [{"slide_id": name, "status": "failed"} for name in sorted(failed)]
    with atomic_path(path) as partial:
        pd.DataFrame(rows).map(plain_cell).to_csv(partial, index=False)
    return path
