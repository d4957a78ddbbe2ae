"""What happens to a training run, its workers and its folder when the system speaks to it, or another run comes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ssl_standins
import torch
from ignite.engine import Events
from ssl_standins import make_trainer

from cytossl_monai.engines.ssl.checkpoint import find_checkpoints, read_checkpoint
from cytossl_monai.handlers.collapse import CollapseMonitor
from cytossl_monai.methods.moco_v3 import MoCoV3
from cytossl_monai.metrics.logged import read_log
from cytossl_monai.networks.nets.resnet import resnet50
from cytossl_monai.utils.errors import EXIT_PREEMPTED, SettingError
from cytossl_monai.utils.locks import LOCK_NAME, LockedError, folder_lock
from cytossl_monai.utils.parallel import run_parallel

STANDINS = Path(ssl_standins.__file__)
ROOT = Path(__file__).parents[2]


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a training in a group of its own, as a batch system does; returns at its second step."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "2":
            return process
    raise AssertionError(process.communicate()[1])


def family(output: Path) -> list[int]:
    """Living processes whose command line names the output folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if str(output) in words and state != "Z" and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def gone(output: Path, seconds: float = 40.0) -> bool:
    deadline = time.monotonic() + seconds
    while family(output) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not family(output)


needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")


@needs_proc
def test_torchrun_that_is_asked_to_leave_saves_with_workers_and_two_processes(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(STANDINS)]
    process = start([*launch, str(tmp_path), "--steps", "4000", "--workers", "1", "--tell", "--group"])
    process.send_signal(signal.SIGTERM)  # torchrun hands it to the groups of its processes, workers and all
    _, errors = process.communicate(timeout=120)
    saved = find_checkpoints(tmp_path / "checkpoints")
    assert saved, errors
    assert read_checkpoint(saved[0])["step"] < 4000
    assert f"Exit status {EXIT_PREEMPTED}" in errors or f"exitcode: {EXIT_PREEMPTED}" in errors.replace(" ", "")
    assert gone(tmp_path)
    assert not (tmp_path / "checkpoints" / LOCK_NAME).exists()


@needs_proc
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_to_the_main_process_alone_leaves_no_orphans(number: int, status: int, tmp_path: Path) -> None:
    process = start([sys.executable, str(STANDINS), str(tmp_path), "--steps", "4000", "--workers", "2", "--tell"])
    assert len(family(tmp_path)) == 3
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == status
    assert gone(tmp_path)


def test_ctrl_c_is_one_line_and_130(tmp_path: Path) -> None:
    process = start([sys.executable, str(STANDINS), str(tmp_path), "--steps", "4000", "--workers", "1", "--tell"])
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1].startswith("interrupted; what is finished is kept")
    assert "Traceback" not in errors


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_the_run_after_the_step(tmp_path: Path) -> None:
    """An exception of a finaliser is dropped: a Ctrl-C that arrives there would be lost."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that started this in the background ignores it
    trainer = make_trainer(tmp_path, steps=5)

    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    @trainer.on(Events.ITERATION_STARTED(once=2))
    def interrupt() -> None:
        Finalised()

    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.state.iteration == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("ending", ["it ends", "it fails", "a handler takes the error"])
def test_signals_are_given_back_however_the_run_ends(ending: str, tmp_path: Path) -> None:
    """Ignite takes an error with a handler for handled: no handler that is asked after it would hear of it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    trainer = make_trainer(tmp_path, steps=3)

    @trainer.on(Events.ITERATION_STARTED(once=2))
    def fail() -> None:
        assert [signal.getsignal(number) for number in numbers] != before
        if ending != "it ends":
            raise ZeroDivisionError

    if ending == "a handler takes the error":
        trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda error: None)
    with pytest.raises(ZeroDivisionError) if ending == "it fails" else contextlib.nullcontext():
        trainer.run()
    assert [signal.getsignal(number) for number in numbers] == before


SLOW = """
import sys, time
from cytossl_monai.utils.parallel import run_parallel
def work(item):
    print(item, flush=True)
    time.sleep(300)
list(run_parallel(work, [2, 2], 2, progress=False))
"""


@needs_proc
def test_workers_that_are_busy_end_with_their_parent(tmp_path: Path) -> None:
    process = start([sys.executable, "-c", SLOW, str(tmp_path)])
    process.kill()
    process.wait()
    assert gone(tmp_path)
    assert [outcome.unwrap() for outcome in run_parallel(abs, [-1], 1, progress=False)] == [1]


def test_two_in_one_folder_is_refused_and_a_dead_one_taken_over(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "checkpoints", "pretraining"), pytest.raises(LockedError, match="in use by another"):
        make_trainer(tmp_path, steps=4).run()
    assert not (tmp_path / "log.csv").exists()
    make_trainer(tmp_path, steps=4).run()
    steps = [row[0] for row in read_log(tmp_path / "log.csv") if row[2] == "loss"]
    assert steps == [1, 2, 3, 4]
    assert not (tmp_path / "checkpoints" / LOCK_NAME).exists()


def test_the_collapse_monitor_sees_the_same_window_after_a_resume(tmp_path: Path) -> None:
    def figures(folder: Path, *lengths: int) -> list[tuple[int, str, float]]:
        for steps in lengths:
            make_trainer(folder, steps=steps, handlers=(CollapseMonitor(3, samples=40),)).run()
        rows = read_log(folder / "log.csv")
        return [(step, name, value) for step, _, name, value in rows if name in ("rankme", "feature_std") and step > 8]

    whole = figures(tmp_path / "whole", 12)
    assert {name for _, name, _ in whole} == {"rankme", "feature_std"}
    # The schedules know the length of the run: the learning rate is constant here, so that both are the same run.
    [monitor] = [CollapseMonitor(3, samples=40)]
    trainer = make_trainer(tmp_path / "state", steps=6, handlers=(monitor,))
    trainer.run()
    again = CollapseMonitor(3, samples=40)
    resumed = make_trainer(tmp_path / "state", steps=6, handlers=(again,))
    resumed.run()
    torch.testing.assert_close(torch.cat(list(again._pool)), torch.cat(list(monitor._pool)), rtol=0, atol=0)
    assert len(torch.cat(list(again._pool))) >= 40


def test_one_sample_and_batch_normalisation_is_refused_before_training() -> None:
    method = MoCoV3(resnet50(), dim=8, hidden_dim=32)
    with pytest.raises(SettingError, match=re.compile("batch_size is 1, and MoCoV3 normalises", re.DOTALL)):
        make_trainer(None, steps=2, batch=1, method=method)
