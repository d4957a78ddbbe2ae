"""Files that cannot be written, and what killed processes leave."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from cytossl_monai.utils import files
from cytossl_monai.utils.errors import OutputError
from cytossl_monai.utils.files import atomic_path, remove_partials, require_writable, visible_files, write_text

HALF = """
import os, signal, sys
from cytossl_monai.utils.files import atomic_path
with atomic_path(sys.argv[1]) as partial:
    partial.write_bytes(b"half")
    print("half", flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _fresh() -> None:
    files._CLEANED.clear()


def half(path: Path, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HALF, str(path), what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def test_what_a_killed_process_left_goes_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    assert half(tmp_path / "a.parquet", "die").wait() == -signal.SIGKILL
    [dead] = tmp_path.glob("*.parquet")
    live = half(tmp_path / "b.parquet", "live")  # writes beside it, and so removes it
    assert not dead.exists()
    assert visible_files(tmp_path, "*.parquet") == []
    write_text(tmp_path / "c.txt", "whole")
    [left] = tmp_path.glob(".*")
    assert left.name.startswith(".b.")
    live.communicate("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.parquet", "c.txt"]


@pytest.mark.parametrize(("age", "stays"), [(60, True), (2 * 86400, False)])
def test_what_another_machine_left_goes_after_a_day(tmp_path: Path, age: int, stays: bool) -> None:
    old = tmp_path / ".a.x7.12-34-another.machine.partial.h5"
    older = tmp_path / ".best.partial.pt"  # of a version that did not name its process
    for path in (old, older):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    remove_partials(tmp_path)
    assert old.exists() is stays
    assert older.exists() is stays


def _hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros(1 << 20)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * (1 << 20)),
    "torch": lambda path: torch.save(torch.zeros(1 << 20), path),
    "parquet": lambda path: pd.DataFrame({"x": np.random.default_rng(0).random(1 << 18)}).to_parquet(path),
    "hdf5": _hdf5,
}


@pytest.fixture
def _small_files() -> Iterator[None]:
    """The system takes no file above 64 KiB: as on a full disk, the writer is stopped in its middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, heard)


@pytest.mark.usefixtures("_small_files")
@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_a_file_that_the_system_stops_is_told_with_its_path(kind: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="larger than the system allows") as caught, atomic_path(tmp_path / "x") as p:
        WRITERS[kind](p)
    assert str(tmp_path / "x") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_small_files")
@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_full_disk_is_told_whatever_the_library_says(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_is_full", lambda path: True)
    monkeypatch.setitem(files._REASONS, 27, files._REASONS[28])
    with pytest.raises(OutputError, match=r"cannot write .*/x: the disk is full"), atomic_path(tmp_path / "x") as p:
        WRITERS[kind](p)
    assert list(tmp_path.iterdir()) == []


def test_faults_of_the_content_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_path(tmp_path / "x"):
        raise KeyError("content")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        (tmp_path / "elsewhere" / "input").read_bytes()


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="is a file"):
            require_writable(path)
        with pytest.raises(OutputError, match=f"cannot write {path / 'x'}"):
            write_text(path / "x", "")
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(OutputError, match=r"x\.txt: a folder of that name"):
        write_text(tmp_path / "x.txt", "")
    require_writable(tmp_path / "new" / "newer")
    assert not (tmp_path / "new").exists()


def test_a_folder_without_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may always
    with pytest.raises(OutputError, match="you may not write there"):
        require_writable(tmp_path)


def test_a_file_system_that_is_read_only() -> None:
    mounts = Path("/proc/mounts")
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    places = [Path(line.split()[1]) for line in lines if "ro" in line.split()[3].split(",")]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        pytest.skip("nothing is mounted read-only here")
    with pytest.raises(OutputError, match="the file system is read-only; give another folder"):
        require_writable(place / "new")
    with pytest.raises(OutputError, match=f"cannot write {place}/new.txt: the file system is read-only"):
        write_text(place / "new.txt", "")
