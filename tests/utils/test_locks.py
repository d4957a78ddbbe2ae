"""Locks against processes that live, die and come at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cytossl_monai.utils.locks import LOCK_NAME, FileLock, LockedError, folder_lock, read_owner

HOLDER = """
import sys, time
from cytossl_monai.utils.locks import folder_lock
with folder_lock(sys.argv[1], "pretraining"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_owner_is_named_and_a_dead_one_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(LockedError) as caught, folder_lock(tmp_path, "training"):
            pass
        for word in (str(tmp_path), "pretraining", socket.gethostname(), str(process.pid), "since"):
            assert word in str(caught.value)
        assert (tmp_path / LOCK_NAME).is_file()
    finally:
        process.kill()
        process.wait()
    with folder_lock(tmp_path, "training"):
        owner = read_owner(tmp_path / LOCK_NAME)
        assert owner is not None
        assert owner.pid == os.getpid()
    assert "ended without giving it back" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_number_given_out_again_is_another_process(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "first"):
        content = json.loads((tmp_path / LOCK_NAME).read_text())
    if content["born"] is None:
        pytest.skip("this system does not say when a process started")
    (tmp_path / LOCK_NAME).write_text(json.dumps({**content, "born": content["born"] - 1}))
    with folder_lock(tmp_path, "second"):
        pass


@pytest.mark.parametrize(("age", "free"), [(0, False), (3600, True)])
def test_an_owner_on_another_machine_lives_as_long_as_it_gives_signs(tmp_path: Path, age: int, free: bool) -> None:
    with folder_lock(tmp_path, "first"):
        content = json.loads((tmp_path / LOCK_NAME).read_text())
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps({**content, "host": "another"}))
    os.utime(path, (time.time() - age,) * 2)
    lock = FileLock(path, "second")
    assert lock.acquire() is free
    lock.release()


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"pid": 1}'])
def test_a_torn_lock_is_free_when_it_is_old(tmp_path: Path, torn: str) -> None:
    path = tmp_path / LOCK_NAME
    path.write_text(torn)
    assert not FileLock(path, "now").acquire()
    os.utime(path, (time.time() - 3600,) * 2)
    lock = FileLock(path, "later")
    assert lock.acquire()
    lock.release()


def test_release_removes_only_its_own(tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    first = FileLock(path, "first")
    assert first.acquire()
    path.unlink()
    second = FileLock(path, "second")
    assert second.acquire()
    first.release()
    assert path.is_file()
    second.release()
    second.release()
    assert not path.exists()


def _claim(folder: str, number: int, start: float) -> list[int]:
    time.sleep(max(0.0, start - time.time()))
    return [item for item in range(40) if FileLock(Path(folder) / f"{item}.lock", f"worker {number}").acquire()]


def test_of_many_that_come_at_once_one_gets_it(tmp_path: Path) -> None:
    dead = holder(tmp_path)
    dead.kill()
    dead.wait()
    content = (tmp_path / LOCK_NAME).read_text()
    for item in range(0, 40, 2):  # every second one must be taken over
        (tmp_path / f"{item}.lock").write_text(content)
    start = time.time() + 1.0
    with multiprocessing.get_context("fork").Pool(4) as pool:
        claims = pool.starmap(_claim, [(str(tmp_path), n, start) for n in range(4)])
    assert sorted(item for claim in claims for item in claim) == list(range(40))
