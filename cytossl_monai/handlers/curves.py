"""The logged figures as one picture at the end of a run."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ignite.engine import Events

from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.metrics.logged import read_log
from cytossl_monai.utils.distributed import is_main
from cytossl_monai.utils.files import atomic_path

__all__ = ["CurvesPlot", "plot_curves"]


def plot_curves(log: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path | None:
    """Draw every figure of a CSV log over the steps.

    Args:
        log: what ``CSVLog`` wrote.
        path: PNG to write.

    Returns:
        the path, or None where the log holds nothing.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for step, _, figure, value in read_log(log):
        if math.isfinite(value):
            series.setdefault(figure, []).append((step, value))
    if not series:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    columns = min(3, len(series))
    rows = math.ceil(len(series) / columns)
    picture = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(picture)
    for number, (name, points) in enumerate(sorted(series.items(), key=lambda item: (item[0] != "loss", item[0]))):
        axes = picture.add_subplot(rows, columns, number + 1)
        steps, values = zip(*points)
        axes.plot(steps, values, marker="o" if len(points) < 30 else None, markersize=3, linewidth=1.2)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    with atomic_path(path) as partial:
        picture.savefig(partial, dpi=110, format="png")
    return Path(path)


class CurvesPlot:
    """Writes ``curves.png`` when a run ends.

    Args:
        log: the CSV that ``CSVLog`` writes.
        path: the PNG.
    """

    def __init__(self, log: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
        self.log, self.path = Path(log), Path(path)

    def attach(self, engine: SSLTrainer) -> None:
        """Draw at the end, in the first process; attach after the handlers that report figures."""
        if is_main():
            engine.add_event_handler(Events.COMPLETED, lambda: plot_curves(self.log, self.path))
