"""Handlers that watch: collapse, throughput, progress, the CSV log and its picture, TensorBoard and MLflow."""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from PIL import Image
from ssl_standins import make_trainer
from tiny_encoders import TinyEncoder
from torch import Tensor

from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.handlers.collapse import CollapseMonitor, feature_spread, rankme
from cytossl_monai.handlers.csv_log import CSVLog
from cytossl_monai.handlers.curves import CurvesPlot, plot_curves
from cytossl_monai.handlers.progress import ProgressBar
from cytossl_monai.handlers.throughput import Throughput
from cytossl_monai.methods.moco_v3 import MoCoV3
from cytossl_monai.metrics.logged import read_log, scalars
from cytossl_monai.utils.errors import TableError


def test_rankme_is_its_formula() -> None:
    features = torch.randn(40, 12) @ torch.diag(torch.linspace(1, 0.01, 12))
    values = np.linalg.svd(features.numpy().astype(np.float64), compute_uv=False)
    share = values / np.abs(values).sum() + 1e-7
    assert rankme(features) == pytest.approx(np.exp(-np.sum(share * np.log(share))))


def test_rankme_counts_directions() -> None:
    q = torch.linalg.qr(torch.randn(64, 10))[0]
    assert rankme(q) == pytest.approx(10, rel=1e-4)
    assert rankme(q[:, :3] @ torch.linalg.qr(torch.randn(10, 3))[0].T) == pytest.approx(3, rel=1e-3)
    assert rankme(torch.ones(30, 7)) == pytest.approx(1, rel=1e-3)


def test_spread_is_one_on_the_sphere_and_nought_at_a_point() -> None:
    assert feature_spread(torch.randn(4000, 64)) == pytest.approx(1, abs=0.01)
    assert feature_spread(torch.randn(1, 64).expand(50, 64)) == pytest.approx(0, abs=1e-9)
    scale = torch.rand(100, 1) + 0.1
    features = torch.randn(100, 8)
    assert feature_spread(features * scale) == pytest.approx(feature_spread(features))


class OnePoint(TinyEncoder):
    """All images get the same feature."""

    def forward(self, images: Tensor) -> Tensor:
        return 1.0 + 1e-4 * super().forward(images)


class TwoDirections(TinyEncoder):
    """Spread, but on a circle of 16 dimensions."""

    def forward(self, images: Tensor) -> Tensor:
        out = super().forward(images)
        centred = out - out.mean(0)
        return torch.cat([centred[:, :2], centred[:, 2:] * 1e-4], dim=1)


def watched(encoder: TinyEncoder, steps: int = 6, **options: Any) -> tuple[CollapseMonitor, dict[str, float]]:
    monitor = CollapseMonitor(every_steps=3, samples=16, **options)
    trainer = make_trainer(None, steps=steps, handlers=(monitor,), method=MoCoV3(encoder, dim=8, hidden_dim=32))
    trainer.run()
    return monitor, dict(trainer.state.metrics)


def test_a_collapsed_encoder_is_told_in_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cytossl_monai.handlers.collapse"):
        monitor, figures = watched(OnePoint(0.0))
    assert len(monitor.warnings) == 2
    assert "Step 3: collapse. All images get nearly the same feature" in caplog.text
    assert "Lower the learning rate" in caplog.text
    assert figures["feature_std"] < 0.01


def test_few_directions_are_told_apart_from_one_point() -> None:
    monitor, figures = watched(TwoDirections(0.0), min_rank=0.2)
    assert "dimensional collapse" in monitor.warnings[0]
    assert figures["feature_std"] > 0.1


def test_a_healthy_run_is_left_alone() -> None:
    monitor, figures = watched(TinyEncoder(0.0), min_spread=0.01)
    assert monitor.warnings == []
    assert figures["rankme"] > 1


class Told:
    """Puts figures of a teacher into the output of every step, before the monitor looks."""

    def __init__(self, entropy: float, spread: float) -> None:
        self.figures = {"teacher_entropy": torch.tensor(entropy), "teacher_spread": torch.tensor(spread)}

    def attach(self, engine: SSLTrainer) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: e.state.output.update(self.figures))


@pytest.mark.parametrize(
    ("entropy", "spread", "words"),
    [(0.001, 0.005, "the same class"), (3.40, 3.405, "the same target"), (1.0, 3.0, None)],
)
def test_a_teacher_that_tells_nothing(entropy: float, spread: float, words: str | None) -> None:
    monitor = CollapseMonitor(every_steps=2, min_spread=0.0, min_rank=0.0)
    trainer = make_trainer(None, steps=4, handlers=(Told(entropy, spread), monitor))
    trainer.run()
    assert trainer.state.metrics["teacher_information"] == pytest.approx(spread - entropy, abs=1e-5)
    about = [text for text in monitor.warnings if "teacher" in text]
    assert (len(about) == 2 and words in about[0]) if words else about == []


class SlowData:
    """A step that works and a loader that lets it wait, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wait: float, work: float) -> None:
        self.now, self.wait, self.work = 0.0, wait, work
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def attach(self, engine: SSLTrainer) -> None:
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, lambda: self._pass(self.wait))
        engine.add_event_handler(Events.ITERATION_STARTED, lambda: self._pass(self.work))
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self._pass(100.0))  # evaluation does not count

    def _pass(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("wait", "warns"), [(0.1, False), (1.0, True)])
def test_throughput_and_waiting(
    wait: float, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, meter = SlowData(monkeypatch, wait, 1.9), Throughput(every_steps=2, warmup_steps=1)
    trainer = make_trainer(None, steps=7, handlers=(clock, meter))
    with caplog.at_level(logging.INFO, "cytossl_monai.handlers.throughput"):
        trainer.run()
    assert meter.data_wait_share == pytest.approx(wait / (wait + 1.9))
    assert meter.total_images == 6 * 8
    assert trainer.state.metrics["images_per_s"] == pytest.approx(8 / (wait + 1.9))
    assert trainer.state.metrics["data_wait_share"] == pytest.approx(wait / (wait + 1.9))
    assert "of the time was spent waiting for data" in caplog.text
    assert ("Training waits for data" in caplog.text) == warns


def test_progress_shows_steps_loss_and_time_left() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    make_trainer(None, steps=7, handlers=(ProgressBar(1, stream=stream),)).run()
    last = stream.getvalue().split("\r")[-1]
    assert "7/7" in last
    assert "loss=" in last
    assert "<00:00" in last


def test_log_has_every_figure_and_is_cut_back_on_resume(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Keep:
        def attach(self, engine: SSLTrainer) -> None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(scalars(e.state.output)))

    path = tmp_path / "log.csv"
    make_trainer(None, steps=5, handlers=(CSVLog(path, 2), CollapseMonitor(5), Keep())).run()
    rows = read_log(path)
    assert {step for step, _, figure, _ in rows if figure == "loss"} == {1, 2, 4, 5}
    for step, epoch, figure, value in rows:
        assert epoch == 1
        if figure in seen[step - 1]:
            assert value == seen[step - 1][figure]  # to the last bit
    assert {"lr", "weight_decay", "contrast", "rankme"} <= {figure for _, _, figure, _ in rows}
    with open(path, "a", encoding="utf-8") as stream:
        stream.write("6,1,loss,2.5\n7,1,lo")  # a killed run's last words
    assert read_log(path)[-1] == (6, 1, "loss", 2.5)
    trainer = make_trainer(None, steps=5)
    trainer.state.iteration = 4
    CSVLog(path)._start(trainer)
    assert read_log(path) == [row for row in rows if row[0] <= 4]


@pytest.mark.parametrize("line", ["2;1;loss;0,5", "2,1,loss,a lot", "", "2,1,loss"])
def test_a_log_that_was_changed_by_hand_is_a_sentence(line: str, tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=4).run()
    with open(tmp_path / "log.csv", "a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(TableError, match=r"log\.csv is no log of a run any more .* move it away"):
        make_trainer(tmp_path, steps=6).run()


def test_curves_are_drawn_at_the_end(tmp_path: Path) -> None:
    handlers = (CSVLog(tmp_path / "log.csv", 1), CurvesPlot(tmp_path / "log.csv", tmp_path / "curves.png"))
    make_trainer(None, steps=3, handlers=handlers).run()
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("L"))
    assert picture.std() > 5
    assert plot_curves(tmp_path / "nothing.csv", tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    from monai.handlers import TensorBoardStatsHandler
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardStatsHandler(log_dir=str(tmp_path), iteration_log=2, output_transform=scalars, tag_name="train")
    make_trainer(None, steps=4, handlers=(board,)).run()
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [2, 4]


def test_mlflow_overlay(tmp_path: Path, repo_root: Path) -> None:
    """Laid over the bundle it adds a handler to those that are there; MONAI's handler takes what the trainer gives."""
    mlflow = pytest.importorskip("mlflow")
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(
        [
            str(repo_root / "bundles" / "cytossl_pretrain" / "configs" / "train.json"),
            str(repo_root / "configs" / "logs" / "mlflow.yaml"),
        ]
    )
    assert parser["train#handlers"][-1] == "@mlflow_handler"
    assert len(parser["train#handlers"]) > 5
    parser["output_dir"], parser["log_every"] = str(tmp_path), 1
    handler = parser.get_parsed_content("mlflow_handler")
    trainer = make_trainer(None, steps=3, handlers=(handler,))
    losses: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(scalars(e.state.output)["loss"]))
    trainer.run()
    client = mlflow.MlflowClient(parser.get_parsed_content("mlflow_uri"))
    experiment = client.get_experiment_by_name("cytossl_pretrain")
    (run,) = client.search_runs([experiment.experiment_id])
    logged = client.get_metric_history(run.info.run_id, "loss")
    assert [point.value for point in sorted(logged, key=lambda point: point.step)] == pytest.approx(losses)
