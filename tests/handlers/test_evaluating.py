"""Handlers that evaluate and keep: online kNN and linear probe, checkpoints, preemption, divergence, export."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.networks.nets import ViT
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from ssl_standins import SIZE, Dots, make_trainer
from tiny_encoders import TinyEncoder
from torch import nn

from cytossl_monai.data.tiles.labelled import LabelledImages, embed_images
from cytossl_monai.engines.ssl.checkpoint import find_checkpoints, read_checkpoint
from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.handlers import checkpoint as checkpoint_module
from cytossl_monai.handlers.checkpoint import CheckpointHandler
from cytossl_monai.handlers.export import EncoderExport
from cytossl_monai.handlers.online_evaluation import OnlineKNN, OnlineLinearProbe
from cytossl_monai.handlers.signals import PreemptionHandler
from cytossl_monai.methods.moco_v3 import MoCoV3
from cytossl_monai.metrics.knn import knn_predict
from cytossl_monai.metrics.probe import linear_probe
from cytossl_monai.networks.files import load_encoder
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.networks.nets.sr_transformer import SRTransformer
from cytossl_monai.utils.errors import (
    EXIT_PREEMPTED,
    InputError,
    OutputError,
    Preempted,
    SettingError,
    TableError,
    TrainingDiverged,
)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of stand-in images, 20 each: dots as they are, and dots darkened on a dark ground."""
    root = tmp_path_factory.mktemp("labelled")
    for name, shade in (("dark", 0.6), ("light", 1.0)):
        (root / name).mkdir()
        for number, item in enumerate(Dots().__getitems__([(n, n) for n in range(20)])):
            pixels = (item["image"].permute(1, 2, 0).numpy() * shade).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


def at_ends_of_epochs(*figures: float, name: str = "knn") -> object:
    """A handler that reports these values, one an epoch."""

    class Report:
        def attach(self, engine: SSLTrainer) -> None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.report(**{name: figures[e.state.epoch - 1]}))

    return Report()


def test_online_knn_is_the_knn_of_the_encoders_features(labelled: Path) -> None:
    images = LabelledImages(labelled, size=SIZE, n_folds=4)
    trainer = make_trainer(None, steps=5, handlers=(OnlineKNN(images, k=3), OnlineLinearProbe(images)))
    trainer.run()
    features = embed_images(trainer.method.encoder, images.dataset, torch.device("cpu"), batch_size=7)
    labels = torch.tensor(images.labels)
    predicted = torch.empty_like(labels)
    for fold in range(4):
        held = torch.tensor(images.folds == fold)
        predicted[held] = knn_predict(features[~held], labels[~held], features[held], 2, 3, class_weighted=True).argmax(
            1
        )
    scores = [balanced_accuracy_score(labels[images.folds == f], predicted[images.folds == f]) for f in range(4)]
    assert trainer.state.metrics["knn"] == pytest.approx(np.mean(scores))
    probe = linear_probe(features.numpy(), images.labels, images.folds, images.groups)
    assert trainer.state.metrics["linear_probe"] == pytest.approx(probe.balanced_accuracy.mean, abs=1e-6)
    assert trainer.state.metrics["linear_probe_low"] == pytest.approx(probe.balanced_accuracy.low, abs=1e-6)
    assert trainer.state.metrics["linear_probe_auc"] == pytest.approx(probe.auc.mean, abs=1e-6)


def test_an_image_that_cannot_be_read_is_found_before_the_first_step(labelled: Path, tmp_path: Path) -> None:
    """It ended the run at the end of the first epoch, before its checkpoint, and again after every start."""
    shutil.copytree(labelled, tmp_path / "labelled")
    half = tmp_path / "labelled" / "light" / "19.png"
    half.write_bytes(half.read_bytes()[:200])
    trainer = make_trainer(None, steps=5, handlers=(OnlineKNN(LabelledImages(tmp_path / "labelled", size=SIZE)),))
    with pytest.raises(InputError, match=r"19\.png cannot be read"):
        trainer.run()
    assert trainer.state.iteration == 0


def test_an_encoder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    network = ViT(3, (18, 18), (6, 6), hidden_size=16, mlp_dim=32, num_layers=1, num_heads=2, spatial_dims=2)
    for encoder in (Encoder(network, "mean"), TinyEncoder()):
        trainer = make_trainer(
            None, method=MoCoV3(encoder, dim=8, hidden_dim=32), handlers=(EncoderExport(tmp_path / "model.pt"),)
        )
        with pytest.raises(SettingError, match=r"could not be written to .*model\.pt .* take a network of"):
            trainer.run()
        assert trainer.state.iteration == 0


def test_a_place_that_cannot_be_written_is_told_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    network = SRTransformer(3, 18, 6, hidden_size=16, mlp_dim=32, num_layers=1, num_heads=2)
    method = MoCoV3(Encoder(network, "mean"), dim=8, hidden_dim=32)
    trainer = make_trainer(None, method=method, handlers=(EncoderExport(tmp_path / "models" / "model.pt"),))
    with pytest.raises(OutputError, match="models is a file; give another folder"):
        trainer.run()
    assert trainer.state.iteration == 0


def test_evaluation_does_not_touch_the_training(labelled: Path) -> None:
    images = LabelledImages(labelled, size=SIZE, n_folds=4)
    plain = make_trainer(None, steps=10)
    watched = make_trainer(None, steps=10, handlers=(OnlineKNN(images), OnlineLinearProbe(images, every_epochs=1)))
    plain.run(), watched.run()
    for name, value in plain.method.state_dict().items():
        assert torch.equal(value, watched.method.state_dict()[name]), name


def test_features_are_taken_in_evaluation_mode_and_modes_are_put_back(labelled: Path) -> None:
    encoder = TinyEncoder(dropout=0.5).train()
    encoder.blocks[1].eval()
    before = [module.training for module in encoder.modules()]
    images = LabelledImages(labelled, size=SIZE)
    first, again = (images.features(encoder, torch.device("cpu"), batch) for batch in (64, 9))
    assert first.shape == (40, 16)
    torch.testing.assert_close(first, again)
    assert [module.training for module in encoder.modules()] == before


def test_labelled_images_refuse_what_cannot_be_judged(labelled: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("image,label\n" + "".join(f"{file},dark\n" for file in (labelled / "dark").glob("*.png")))
    with pytest.raises(TableError, match="one class only"):
        LabelledImages(table, size=SIZE)
    with pytest.raises(TableError, match="without a label"):
        LabelledImages(labelled / "dark", size=SIZE)
    assert len(LabelledImages(labelled, size=SIZE, limit=15)) == 15


@pytest.mark.parametrize(
    ("dark", "light", "words"),
    [(9, 1, "only the class dark is left to learn from"), (4, 4, "5 folds need a class with as many images")],
)
def test_folds_that_no_probe_could_learn_from_are_refused_before_training(
    dark: int, light: int, words: str, labelled: Path, tmp_path: Path
) -> None:
    """The linear probe comes at the end of a run: it ended there with scikit-learn's words, and without its model."""
    rows = [f"{file},{name}\n" for name, count in (("dark", dark), ("light", light))
            for file in sorted((labelled / name).iterdir())[:count]]  # fmt: skip
    (tmp_path / "table.csv").write_text("image,label\n" + "".join(rows))
    with pytest.raises(TableError, match=words):
        LabelledImages(tmp_path / "table.csv", size=SIZE)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    keeper = CheckpointHandler(tmp_path, every_epochs=1, keep_last=2)
    make_trainer(None, steps=25, handlers=(at_ends_of_epochs(0.3, 0.8, 0.5, 0.8, 0.1), keeper)).run()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_00000025.pt", "step_00000020.pt"]
    assert keeper.best == {"value": 0.8, "step": 10.0}  # the first of two alike
    best = read_checkpoint(tmp_path / "best.pt")
    assert (best["step"], best["metrics"]["knn"]) == (10, pytest.approx(0.8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step_00000020.pt", "step_00000025.pt"]


def test_a_figure_of_another_step_does_not_make_a_checkpoint_the_best(tmp_path: Path) -> None:
    keeper = CheckpointHandler(tmp_path, every_epochs=0, every_steps=4, keep_last=9)
    make_trainer(None, steps=10, handlers=(at_ends_of_epochs(0.9, 0.2), keeper)).run()
    # The figure of step 5 is not that of step 8; that of step 10, the end, is its own.
    assert keeper.best == {"value": 0.2, "step": 10.0}


@pytest.mark.parametrize("every_epochs", [0, 1])
def test_a_checkpoint_due_by_its_step_at_the_end_of_an_epoch_has_the_epochs_figures(
    every_epochs: int, tmp_path: Path
) -> None:
    keeper = CheckpointHandler(tmp_path, every_epochs, every_steps=5, keep_last=9)
    make_trainer(None, steps=15, handlers=(at_ends_of_epochs(0.4, 0.9, 0.2), keeper)).run()
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 10
    kept = read_checkpoint(tmp_path / "step_00000010.pt")
    assert kept["handlers"]["checkpoint"]["best"] == {"value": 0.9, "step": 10.0}
    assert kept["metrics"]["knn"] == pytest.approx(0.9)


def test_the_best_is_remembered_by_a_resumed_run(tmp_path: Path) -> None:
    first = CheckpointHandler(tmp_path)
    make_trainer(None, steps=5, handlers=(at_ends_of_epochs(0.9), first)).run()
    second = CheckpointHandler(tmp_path)
    make_trainer(None, steps=10, handlers=(at_ends_of_epochs(0.9, 0.4), second), checkpoint_dir=tmp_path).run()
    assert second.best == {"value": 0.9, "step": 5.0}
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 5


def test_a_write_that_fails_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(None, steps=5, handlers=(CheckpointHandler(tmp_path, keep_last=1),)).run()
    before = (tmp_path / "step_00000005.pt").read_bytes()

    def full_disk(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half of a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    handlers = (CheckpointHandler(tmp_path, keep_last=1),)
    with pytest.raises(OutputError, match="the disk is full"):
        make_trainer(None, steps=10, handlers=handlers, checkpoint_dir=tmp_path).run()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005.pt"]
    assert (tmp_path / "step_00000005.pt").read_bytes() == before


def test_best_without_hard_links_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(checkpoint_module.os, "link", refuse)
    make_trainer(None, steps=5, handlers=(at_ends_of_epochs(0.9), CheckpointHandler(tmp_path))).run()
    assert (tmp_path / "best.pt").read_bytes() == (tmp_path / "step_00000005.pt").read_bytes()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_the_step_and_leaves_with_a_status_of_its_own(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Ask:
        def attach(self, engine: SSLTrainer) -> None:
            def ask(engine: SSLTrainer) -> None:
                if engine.state.iteration == 3:
                    os.kill(os.getpid(), getattr(signal, name))

            engine.add_event_handler(Events.ITERATION_STARTED, ask)

    before = signal.getsignal(getattr(signal, name))
    handlers = (Ask(), CheckpointHandler(tmp_path), PreemptionHandler())
    with pytest.raises(Preempted) as left, caplog.at_level(logging.WARNING):
        make_trainer(None, steps=10, handlers=handlers).run()
    assert left.value.code == EXIT_PREEMPTED == 75
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_00000003.pt"]
    assert "start the same command again" in caplog.text
    assert signal.getsignal(getattr(signal, name)) == before


def test_preemption_needs_something_that_saves() -> None:
    with pytest.raises(ValueError, match="CheckpointHandler before it"):
        make_trainer(None, handlers=(PreemptionHandler(),))


class NaNAt(nn.Module):
    """A method whose loss becomes infinite at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.encoder, self.step, self.calls = TinyEncoder(0.0), step, 0

    def forward(self, views: dict) -> dict:
        self.calls += 1
        loss = self.encoder(views["global"][0]).square().mean()
        return {"loss": loss * (float("inf") if self.calls == self.step else 1.0)}

    def update(self, progress: float) -> None: ...


def test_divergence_names_step_checkpoint_and_causes(tmp_path: Path) -> None:
    keeper = CheckpointHandler(tmp_path, every_epochs=0, every_steps=4)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingDiverged) as told:
        make_trainer(None, steps=12, method=NaNAt(7), handlers=(keeper, PreemptionHandler())).run()
    assert signal.getsignal(signal.SIGTERM) == before, "a run that fails goes on listening"
    for part in ("at step 7 of 12", "step_00000004.pt", "learning rate too high", "set clip_norm"):
        assert part in str(told.value)


def test_spoilt_weights_are_told_before_a_probe_meets_them(labelled: Path) -> None:
    class NaNGradient(NaNAt):
        def forward(self, views: dict) -> dict:
            features = self.encoder(views["global"][0])
            return {"loss": features.square().mean() + (features * 0).sum().abs().sqrt()}

    probe = OnlineLinearProbe(LabelledImages(labelled, size=SIZE))
    with pytest.raises(TrainingDiverged, match="a weight became NaN"):
        make_trainer(None, steps=1, method=NaNGradient(1), handlers=(probe,)).run()


def test_export_is_the_encoder(tmp_path: Path) -> None:
    network = SRTransformer(3, 18, 6, hidden_size=16, mlp_dim=32, num_layers=1, num_heads=2, class_token=True)
    method = MoCoV3(Encoder(network), dim=8, hidden_dim=32)
    make_trainer(None, steps=2, method=method, handlers=(EncoderExport(tmp_path / "model.pt", {"mpp": 0.5}),)).run()
    encoder, meta = load_encoder(tmp_path / "model.pt")
    images = torch.randint(0, 256, (3, 3, 18, 18), dtype=torch.uint8)
    assert torch.equal(encoder(images), method.encoder.eval()(images))
    assert (meta["method"], meta["steps"], meta["mpp"]) == ("MoCoV3", 2, 0.5)
