"""The paper's slide-level tables: encoder x MIL method (table 1), and what each part adds (table 2), seeds paired."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cytossl_monai.data.bags.features import read_features, write_features
from cytossl_monai.engines.mil.cross_validate import cross_validate
from cytossl_monai.engines.study.paper import PaperStudy
from cytossl_monai.index import SlideIndexer
from cytossl_monai.metrics.bootstrap import Interval, bootstrap_intervals
from cytossl_monai.metrics.classification import auc, classification_metrics
from cytossl_monai.networks.cards import read_card
from cytossl_monai.utils.errors import InputError, RunError
from cytossl_monai.utils.files import visible_files

__all__ = ["SlideRow", "SlideStudy", "paired_over_seeds_and_patients", "slide_table"]

logger = logging.getLogger(__name__)
_KEYS = {"table", "index", "tiles_per_slide", "folds", "mil", "methods", "encoders", "tables"}
TWO_SCALES = frozenset({"less"})
"""Methods that read two scales; the others get the first half of the same features."""


@dataclass(frozen=True)
class SlideRow:
    """Out-of-fold predictions of one encoder, method and seed.

    Args:
        encoder: name in the study.
        method: name of the overlay in ``configs/mil``.
        seed: of the encoder, the folds and the training.
        slides: (n,) slide_ids.
        patients: (n,) patient_ids.
        labels: (n,) int64.
        probabilities: (n, C).
        figures: ``auc``, ``accuracy``, ``recall``, ``precision``, ``specificity``.
    """

    encoder: str
    method: str
    seed: int
    slides: list[str]
    patients: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    figures: Mapping[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """One row of a CSV: names and figures."""
        return {"encoder": self.encoder, "method": self.method, "seed": self.seed, **self.figures}


class SlideStudy:
    """Indexes, embeds and cross-validates whatever is missing; every part goes on where it stopped.

    A cell's folder is ``<output>/slides/mil/<encoder>/seed<n>/<method>``. The same seed means the same folds for every
    encoder and method, so that differences are paired over seeds and patients.

    Args:
        study: what ``read_paper_study`` gives, with its section ``slides``: ``table`` (slides with labels, relative to
            ``data``), ``index`` (fields of ``IndexSettings``), ``tiles_per_slide``, ``folds``, ``mil`` (settings of
            the MIL bundle), ``methods`` (overlays of ``configs/mil``), ``encoders`` (name -> ``arm``, an arm of the
            study whose seeds are its own; or ``encoder`` and ``weights``, a card and its file under ``data``; or
            ``weights`` alone, an encoder file of this package, and ``made_by``, how one is made), ``tables``.
        images: the study that trains the arms.
        embed: embeds what is not embedded yet: called with the keywords ``slides``, ``index_dir``, ``output_dir``,
            ``encoder``, ``weights``, ``two_scales`` and ``tiles_per_slide``, as ``FeatureEmbedder`` takes them.

    Raises:
        InputError: for a section that is missing or unknown, or a slide table that is not there.
    """

    def __init__(self, study: Mapping[str, Any], images: PaperStudy, embed: Callable[..., Any]) -> None:
        content = study.get("slides")
        sections = set(content or {})
        if sections != _KEYS:
            raise InputError(
                f"the study's section slides must have {', '.join(sorted(_KEYS))}; look at "
                f"{', '.join(sorted(sections ^ _KEYS))}"
            )
        assert content is not None
        self.settings, self.images, self.embed = dict(content), images, embed
        self.table = images.data / self.settings["table"]
        if not self.table.is_file():
            raise InputError(f"slide table {self.table} of the study is not there; write one with labels")
        self.folder = images.output / "slides"
        self.seeds: list[int] = list(study["seeds"])
        self.absent = self._absent()

    def _absent(self) -> dict[str, str]:
        """Encoders whose weights are not there: which file is missing, where it goes and where it is to be had."""
        sentences = {}
        for name, about in self.settings["encoders"].items():
            weights = about.get("weights")
            if weights is None or (self.images.data / weights).is_file():
                continue
            source = about.get("made_by", "")
            if "encoder" in about:
                card = read_card(self.images.root / about["encoder"])
                source = f"{card.where_to_get} Its file is {card.file}." if card.file else card.where_to_get
            sentences[name] = (
                f"{name} is left out: its weights {self.images.data / weights} are not there. {source}".rstrip()
            )
        return sentences

    def cells(
        self, encoders: Sequence[str] | None = None, methods: Sequence[str] | None = None
    ) -> Iterator[tuple[int, str, str]]:
        """Seed, encoder and method of what the tables ask for, seed by seed, so that a stopped study has pairs.

        Encoders whose weights are not there are left out, with a sentence each in the log (:attr:`absent`).

        Args:
            encoders: only these; None: all.
            methods: only these; None: all.

        Raises:
            InputError: for names that the study does not have.
        """
        for names, known in ((encoders, self.settings["encoders"]), (methods, self.settings["methods"])):
            unknown = [name for name in names or () if name not in known]
            if unknown:
                raise InputError(f"unknown {', '.join(unknown)}; this study has {', '.join(known)}")
        wanted = {
            (encoder, method)
            for table in self.settings["tables"].values()
            for encoder in table["rows"]
            for method in table["methods"]
        }
        available = [name for name in self.settings["encoders"] if name not in self.absent]
        for name, why in self.absent.items():
            if not encoders or name in encoders:
                logger.warning("%s", why)
        for seed in self.seeds:
            for encoder in available:
                for method in self.settings["methods"]:
                    chosen = (not encoders or encoder in encoders) and (not methods or method in methods)
                    if chosen and (encoder, method) in wanted:
                        yield seed, encoder, method

    def index(self) -> Path:
        """Index the slides that are not indexed yet.

        Raises:
            RunError: when no slide could be.
        """
        report = SlideIndexer(
            self.table, self.folder / "index", self.settings["index"], num_workers=0, overview=False, progress=False
        ).run()
        if report.exit_code == 1:
            raise RunError(f"no slide of {self.table} could be indexed; see {self.folder / 'index' / 'report.csv'}")
        return self.folder / "index"

    def features(self, encoder: str, seed: int) -> dict[bool, Path]:
        """Features of both scales (True) and of the tiles alone (False), by the encoder of a seed."""
        about = self.settings["encoders"][encoder]
        weights = about.get("weights")
        source: Path | None
        if "arm" in about:
            source = self.images.train(self.images.runs([about["arm"]], [f"seed{seed}"])[0])
            own = self.folder / "features" / encoder / f"seed{seed}"
        else:
            weights = None if weights is None else self.images.data / weights
            # Weights without a card are an encoder file of this package.
            source, weights = (self.images.root / about["encoder"], weights) if "encoder" in about else (weights, None)
            own = self.folder / "features" / encoder / "any"
        self.embed(
            slides=self.table,
            index_dir=self.index(),
            output_dir=own / "two",
            encoder=source,
            weights=weights,
            two_scales=True,
            tiles_per_slide=self.settings["tiles_per_slide"],
        )
        for path in visible_files(own / "two", "*.h5"):
            half = own / "one" / path.name
            if not half.is_file() or half.stat().st_mtime < path.stat().st_mtime:
                _first_scale(path, half)
        return {True: own / "two", False: own / "one"}

    def row(self, seed: int, encoder: str, method: str) -> SlideRow:
        """Cross-validate one cell, or what is left of it."""
        folder = self.folder / "mil" / encoder / f"seed{seed}" / method
        result = cross_validate(
            self.images.root / "bundles/cytossl_mil/configs/train.json",
            self.table,
            self.features(encoder, seed)[method in TWO_SCALES],
            folder,
            n_folds=self.settings["folds"],
            seed=seed,
            overlays=[self.images.root / f"configs/mil/{method}.yaml"],
            overrides=self.settings["mil"],
            num_workers=0,
            n_resamples=20,
        )
        table = pd.read_csv(folder / "predictions.csv").set_index("slide_id")
        patients = [str(table.loc[slide, "patient_id"]) for slide in result.slides]
        figures = classification_metrics(result.labels, result.probabilities)
        kept = {name: float(figures[name]) for name in ("auc", "accuracy", "recall", "precision", "specificity")}
        return SlideRow(encoder, method, seed, result.slides, patients, result.labels, result.probabilities, kept)


def _first_scale(source: Path, target: Path) -> None:
    """The tiles' own features of a file that holds two scales."""
    bag = read_features(source)
    attrs = {key: value for key, value in bag.attrs.items() if key != "scales"}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_features(target, bag.features[:, : bag.features.shape[1] // 2], bag.coords, attrs)


def paired_over_seeds_and_patients(
    ours: Sequence[SlideRow], base: Sequence[SlideRow], n_resamples: int = 2000, seed: int = 0
) -> tuple[Interval, int]:
    """AUC of one less that of another, mean over the seeds that both have, on the slides that both predicted.

    Every draw of the bootstrap takes whole patients, class by class, and seeds with replacement: the same ones for
    both. With a single seed the interval is of the patients alone.

    Args:
        ours: rows of one encoder and method, one a seed.
        base: of the other.
        n_resamples: draws.
        seed: of the draws.

    Returns:
        the difference with its 95 % interval, and the number of seeds; NaN where there is no pair.
    """
    other = {row.seed: row for row in base}
    pairs = [(row, other[row.seed]) for row in ours if row.seed in other]
    if not pairs:
        return Interval(float("nan"), float("nan"), float("nan")), 0
    common = [slide for slide in pairs[0][0].slides if all(slide in set(r.slides) for pair in pairs for r in pair)]
    place = [[{s: i for i, s in enumerate(row.slides)} for row in pair] for pair in pairs]
    scores = np.array(  # (seeds, 2, n, C)
        [
            [row.probabilities[[at[slide] for slide in common]] for row, at in zip(pair, spots)]
            for pair, spots in zip(pairs, place)
        ],
        dtype=np.float64,
    )
    first = pairs[0][0]
    rows = [place[0][0][slide] for slide in common]
    labels, patients = first.labels[rows], [first.patients[row] for row in rows]
    rng = np.random.default_rng([seed, 1])  # not the stream that draws the patients
    everything = np.arange(len(pairs))

    def difference(drawn: np.ndarray, seeds: np.ndarray) -> float:
        gains = [_auc(labels[drawn], scores[s, 0, drawn]) - _auc(labels[drawn], scores[s, 1, drawn]) for s in seeds]
        return float(np.mean(gains))

    interval = bootstrap_intervals(
        lambda drawn: {"gain": difference(drawn, rng.choice(everything, len(pairs)))},
        len(common),
        patients,
        labels,
        n_resamples,
        seed=seed,
    )["gain"]
    # The value is that of all slides and all seeds; the bootstrap drew seeds for its own as well.
    return replace(interval, value=difference(np.arange(len(common)), everything)), len(pairs)


def _auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Of two classes that of the second; of more the mean of each against the others."""
    classes = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    return float(np.mean([auc(labels == number, scores[:, number]) for number in classes]))


def slide_table(
    study: Mapping[str, Any],
    rows: Sequence[SlideRow],
    n_resamples: int = 2000,
    absent: Mapping[str, str] | None = None,
) -> str:
    """Markdown: for each slide-level table of the study the paper's figures beside ours.

    Args:
        study: with the section ``slides``; of each table ``methods``, ``base`` (the row that the others are compared
            with) and ``rows``: name -> the paper's figures of each method as text.
        rows: what :meth:`SlideStudy.row` gave.
        n_resamples: of the intervals.
        absent: :attr:`SlideStudy.absent`: why an encoder could not be run.

    Returns:
        One line a row and method: AUC, accuracy and recall of the paper, ours as means over the seeds, and the gain in
        AUC over the base, paired over seeds and patients. Below, why encoders are left out.
    """
    lines: list[str] = []
    for title, table in study["slides"]["tables"].items():
        heads = ["encoder", "method", "paper: AUC / accuracy % / recall %", "ours", "seeds", "gain in AUC (95 %)"]
        lines += [f"**{title}**", "", f"| {' | '.join(heads)} |"]
        lines.append("|---" * 6 + "|")
        for name, published in table["rows"].items():
            for method, theirs in zip(table["methods"], published, strict=True):
                own = [row for row in rows if (row.encoder, row.method) == (name, method)]
                base = [row for row in rows if (row.encoder, row.method) == (table["base"], method)]
                gain = ""
                if own and name != table["base"]:
                    interval, pairs = paired_over_seeds_and_patients(own, base, n_resamples)
                    shown = f"{interval.value:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"
                    one_seed = f"{shown}, one seed: of the patients alone"
                    gain = "no pair" if not pairs else shown if pairs > 1 else one_seed
                ours = "no weights" if name in (absent or {}) else "not run"
                if own:
                    means = [float(np.mean([row.figures[f] for row in own])) for f in ("auc", "accuracy", "recall")]
                    ours = f"{means[0]:.3f} / {100 * means[1]:.1f} / {100 * means[2]:.1f}"
                lines.append(f"| {name} | {method} | {theirs} | {ours} | {len(own)} | {gain} |")
        lines.append("")
    lines += [sentence for why in (absent or {}).values() for sentence in (why, "")]
    return "\n".join(lines)
