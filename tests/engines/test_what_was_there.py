"""A run in a folder where another one has been, with other settings, or with weights that are spoilt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_pair import run_pair
from ssl_standins import make_trainer
from tiny_encoders import TinyEncoder, small_vit
from torch import nn

from cytossl_monai.engines.ssl.checkpoint import find_checkpoints, load_checkpoint, read_checkpoint
from cytossl_monai.engines.ssl.optim import build_optimizer
from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.handlers.checkpoint import CheckpointHandler
from cytossl_monai.handlers.export import EncoderExport
from cytossl_monai.methods.moco_v3 import MoCoV3
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.utils.errors import CheckpointError, TrainingDiverged


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_run_from_the_start_keeps_its_own_checkpoints_and_sets_the_others_aside(tmp_path: Path) -> None:
    """The old ones are of later steps: they counted as the newest, and the new run's were deleted as it wrote them."""
    make_trainer(tmp_path, steps=20, every_steps=8).run()
    folder = tmp_path / "checkpoints"
    shutil.copy(folder / "step_00000020.pt", folder / "best.pt")
    make_trainer(tmp_path, steps=8, resume=False).run()
    old = [f"earlier_step_000000{step}.pt" for step in (16, 20)]
    own = ["step_00000004.pt", "step_00000008.pt"]
    assert names(folder) == ["earlier_best.pt", "earlier_step_00000008.pt", *old, *own]
    make_trainer(tmp_path, steps=10).run()
    assert names(folder)[-3:] == ["step_00000004.pt", "step_00000008.pt", "step_00000010.pt"]


def test_a_damaged_checkpoint_does_not_push_the_good_ones_out(tmp_path: Path) -> None:
    make_trainer(None, steps=12, handlers=(CheckpointHandler(tmp_path, 0, 4, keep_last=2),)).run()
    (tmp_path / "step_00000012.pt").write_bytes(b"half")
    keeper = CheckpointHandler(tmp_path, 0, every_steps=1, keep_last=1)
    make_trainer(None, steps=11, handlers=(keeper,), checkpoint_dir=tmp_path).run()
    assert names(tmp_path) == ["earlier_step_00000012.pt", "step_00000011.pt"]


def test_a_folder_may_be_called_damaged(tmp_path: Path) -> None:
    make_trainer(tmp_path / "damaged slides", steps=4).run()
    with pytest.raises(CheckpointError, match="another architecture"):
        make_trainer(tmp_path / "damaged slides", method=MoCoV3(TinyEncoder(), dim=12, hidden_dim=32)).run()


def with_optimizer(output: Path, steps: int, name: str, **settings: Any) -> SSLTrainer:
    trainer = make_trainer(output, steps=steps)
    trainer.optimizer = build_optimizer(trainer.network, name, lr=1e-3, **settings)
    return trainer


@pytest.mark.parametrize(("before", "after"), [("adamw", "lars"), ("lars", "sgd"), ("sgd", "adam")])
def test_another_kind_of_optimiser_is_refused(before: str, after: str, tmp_path: Path) -> None:
    with_optimizer(tmp_path, 4, before).run()
    with pytest.raises(CheckpointError, match=r"step_00000004.pt was made with another optimiser.*restore"):
        with_optimizer(tmp_path, 6, after).run()


def test_settings_of_the_optimiser_that_were_changed_have_their_effect(tmp_path: Path) -> None:
    with_optimizer(tmp_path, 4, "adamw").run()
    newest = find_checkpoints(tmp_path / "checkpoints")[0]
    trainer = with_optimizer(tmp_path, 6, "adam", betas=(0.5, 0.6))
    load_checkpoint(trainer, newest)
    group = trainer.optimizer.param_groups[0]
    assert group["betas"] == (0.5, 0.6)
    assert not group.get("decoupled_weight_decay", False), "Adam went on as AdamW"
    state = read_checkpoint(newest)["optimizer"]["state"][0]
    assert torch.equal(trainer.optimizer.state[group["params"][0]]["exp_avg"], state["exp_avg"])


def test_a_checkpoint_whose_optimiser_has_no_groups_is_damaged(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=8).run()
    newest = find_checkpoints(tmp_path / "checkpoints")[0]
    torch.save({**read_checkpoint(newest), "optimizer": {"state": {}}}, newest)
    trainer = make_trainer(tmp_path, steps=8)
    trainer.run()
    assert read_checkpoint(newest)["optimizer"]["param_groups"], "written anew from the one before"


class NaNGradientAt(nn.Module):
    """A method whose loss stays finite and whose gradient is NaN at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.encoder, self.step, self.calls = Encoder(small_vit(img_size=18, patch_size=6)), step, 0

    def forward(self, views: dict) -> dict:
        self.calls += 1
        features = self.encoder(views["global"][0])
        loss = features.square().mean()
        return {"loss": loss + (features * 0).sum().abs().sqrt() if self.calls == self.step else loss}

    def update(self, progress: float) -> None: ...


@pytest.mark.parametrize("step", [8, 12])
def test_spoilt_weights_are_neither_saved_nor_exported(step: int, tmp_path: Path) -> None:
    """Step 8 is that of a checkpoint; step 12, the last, that of the export."""
    handlers = (EncoderExport(tmp_path / "model.pt"),)
    with pytest.raises(TrainingDiverged, match=rf"a weight became NaN.*at step {step} of 12.*step_0000000{step - 4}"):
        make_trainer(tmp_path, steps=12, method=NaNGradientAt(step), handlers=handlers).run()
    for path in find_checkpoints(tmp_path / "checkpoints"):
        assert all(torch.isfinite(value).all() for value in read_checkpoint(path)["model"].values())
    assert not (tmp_path / "model.pt").exists()


def from_a_folder_of_its_own(rank: int) -> str:
    """What a process says whose machine sees another folder than the first one's."""
    folder = Path(torch.load("folder.pt", weights_only=True))
    try:
        make_trainer(folder / str(rank), steps=6).run()
    except CheckpointError as error:
        return str(error)
    return "trained"


def test_processes_that_would_go_on_from_different_steps_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(str(tmp_path), "folder.pt")
    make_trainer(tmp_path / "0", steps=4).run()
    for said in run_pair(from_a_folder_of_its_own, tmp_path):
        assert "would go on from the steps [0, 4]; give a checkpoint_dir that all machines see" in said
