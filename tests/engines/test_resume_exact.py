"""A run that is killed and resumed is, step by step and bit for bit, the run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ssl_standins
import torch
from ssl_standins import make_trainer
from tiny_encoders import TinyEncoder

from cytossl_monai.engines.ssl.checkpoint import find_checkpoints, read_checkpoint
from cytossl_monai.methods.moco_v3 import MoCoV3
from cytossl_monai.metrics.logged import read_log
from cytossl_monai.utils.errors import EXIT_PREEMPTED, CheckpointError

SCRIPT = Path(ssl_standins.__file__)


def start(output: Path, *arguments: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), str(output), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, dict]:
    """Log and last checkpoint of 12 steps in one go, read in this process."""
    output = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    make_trainer(output, steps=12).run()
    return read_log(output / "log.csv"), read_checkpoint(output / "checkpoints" / "step_00000012.pt")


def assert_same_run(output: Path, whole_run: tuple[list, dict]) -> None:
    log, last = whole_run
    assert read_log(output / "log.csv") == log
    again = read_checkpoint(output / "checkpoints" / "step_00000012.pt")
    assert all(torch.equal(again["model"][name], value) for name, value in last["model"].items())
    for number, state in last["optimizer"]["state"].items():
        assert all(torch.equal(again["optimizer"]["state"][number][k], v) for k, v in state.items())


def test_log_has_every_step(whole_run: tuple[list, dict]) -> None:
    losses = [value for _, _, figure, value in whole_run[0] if figure == "loss"]
    assert len(losses) == 12
    assert len(set(losses)) == 12


def test_sigkill_with_workers_then_resume(tmp_path: Path, whole_run: tuple[list, dict]) -> None:
    killed = start(tmp_path, "--kill-at", "7")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in find_checkpoints(tmp_path / "checkpoints")] == ["step_00000004.pt"]
    assert max(row[0] for row in read_log(tmp_path / "log.csv")) == 6
    resumed = make_trainer(tmp_path, steps=12, workers=1)
    resumed.run()
    assert resumed.last_checkpoint is not None
    assert_same_run(tmp_path, whole_run)


def test_sigterm_saves_and_exits_with_its_own_status(tmp_path: Path, whole_run: tuple[list, dict]) -> None:
    process = start(tmp_path, "--tell", "--workers", "0")
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "2":
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_PREEMPTED, errors
    saved = find_checkpoints(tmp_path / "checkpoints")
    assert len(saved) == 1
    assert read_checkpoint(saved[0])["step"] in (2, 3, 4)
    make_trainer(tmp_path, steps=12).run()
    assert_same_run(tmp_path, whole_run)


def test_finished_run_is_not_run_again(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=4).run()
    before = read_log(tmp_path / "log.csv")
    again = make_trainer(tmp_path, steps=4)
    again.run()
    assert again.state.iteration == 4
    assert read_log(tmp_path / "log.csv") == before


@pytest.mark.parametrize("steps", [4, 5, 10])
def test_runs_stop_at_their_step_within_and_at_the_end_of_an_epoch(tmp_path: Path, steps: int) -> None:
    trainer = make_trainer(tmp_path, steps=steps, epoch_length=5)
    trainer.run()
    assert trainer.state.iteration == steps


def test_damaged_checkpoint_is_passed_over(tmp_path: Path, whole_run: tuple[list, dict]) -> None:
    make_trainer(tmp_path, steps=12, handlers=(Stop(9),)).run()
    newest, before = find_checkpoints(tmp_path / "checkpoints")[:2]
    newest.write_bytes(newest.read_bytes()[:1000])
    trainer = make_trainer(tmp_path, steps=12)
    with pytest.MonkeyPatch.context() as patch:
        starts: list[int] = []
        sampler = trainer.data_loader.batch_sampler  # type: ignore[union-attr]
        patch.setattr(sampler, "set_start_step", lambda s: (starts.append(s), setattr(sampler, "start_step", s)))
        trainer.run()
    assert starts == [read_checkpoint(before)["step"]]
    assert_same_run(tmp_path, whole_run)


def test_only_damaged_checkpoints_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000004.pt").write_bytes(b"no zip file")
    with pytest.raises(CheckpointError, match="damaged"):
        make_trainer(tmp_path).run()


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=4).run()
    with pytest.raises(CheckpointError, match=r"another architecture.*projector"):
        make_trainer(tmp_path, method=MoCoV3(TinyEncoder(), dim=12, hidden_dim=32)).run()


def test_a_checkpoint_holds_nothing_but_plain_data(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=4).run()
    content = torch.load(tmp_path / "checkpoints" / "step_00000004.pt", weights_only=True)
    assert content["format"] == "cytossl-train"
    encoder_file = tmp_path / "model.pt"
    torch.save({"format": "cytossl-encoder", "version": 1}, encoder_file)
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        read_checkpoint(encoder_file)


class Stop:
    """Ends a run at a step, as an error in another handler would, without the end of the run being told."""

    def __init__(self, step: int) -> None:
        self.step = step

    def attach(self, engine: object) -> None:
        from ignite.engine import Events

        def stop(engine) -> None:
            if engine.state.iteration == self.step:
                engine.terminate(skip_completed=True)

        engine.add_event_handler(Events.ITERATION_COMPLETED, stop)  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", ["step", "model", "optimizer", "metrics", "version", "whole", "random"])
def test_a_checkpoint_without_its_fields_is_a_sentence(
    change: str, tmp_path: Path, whole_run: tuple[list, dict]
) -> None:
    path = tmp_path / "step_4.pt"
    content = {"format": "cytossl-train", "version": 1, "step": 4, "total_steps": 12, "method": "m", "model": {}}
    content |= {"optimizer": {}, "scaler": {}, "data": {}, "metrics": {}, "handlers": {}}
    torch.save([1, 2] if change == "whole" else {k: v for k, v in content.items() if k != change}, path)
    if change == "random":
        path.write_bytes(np.random.default_rng(0).bytes(2000))
    with pytest.raises(CheckpointError, match=r"step_4\.pt") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
