"""The last line of a program, its exit status, and where the traceback goes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cytossl_monai.utils.errors import SlideError
from cytossl_monai.utils.program import sentence

PROGRAM = """
import sys
from cytossl_monai.utils.program import keep_logs_in, plain_errors
plain_errors()
if len(sys.argv) > 2:
    keep_logs_in(sys.argv[2])
{body}
"""
BODIES = {
    "known": "from cytossl_monai.utils.errors import SlideError\nraise SlideError('a.svs is empty; copy it again')",
    "wrapped": (
        "from cytossl_monai.utils.errors import SlideError\n"
        "try:\n    raise SlideError('a.svs is empty; copy it again')\n"
        "except ValueError as error:\n    raise RuntimeError('Failed to instantiate\\nit') from error"
    ),
    "unexpected": "{}['surprise']",
    "interrupted": "raise KeyboardInterrupt",
    "system": "open('/nowhere/at/all')",
    "printed": "print('M\\udcfcller.svs', flush=True)",
    "memory": "raise MemoryError('Unable to allocate 1 TiB')",
}


def end(kind: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {key: value for key, value in os.environ.items() if key != "CYTOSSL_TRACEBACK"} | environment
    command = [sys.executable, "-c", PROGRAM.replace("{body}", BODIES[kind]), "x", *words]
    return subprocess.run(command, capture_output=True, text=True, env=given, timeout=120, check=False)


@pytest.mark.parametrize(
    ("kind", "line", "status"),
    [
        ("known", "error: a.svs is empty; copy it again", 1),
        ("wrapped", "error: a.svs is empty; copy it again", 1),
        ("system", "error: No such file or directory: /nowhere/at/all", 1),
        ("memory", "error: memory ran out (Unable to allocate 1 TiB); lower batch_size, num_workers or tile_size", 1),
        ("interrupted", "interrupted; what is finished is kept, start again to go on", 130),
    ],
)
def test_one_line_and_no_file(kind: str, line: str, status: int, tmp_path: Path) -> None:
    done = end(kind, str(tmp_path / "out"))
    assert done.returncode == status
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_nobody_expected_leaves_its_traceback_in_the_output_folder(tmp_path: Path) -> None:
    done = end("unexpected", str(tmp_path / "out"))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: KeyError: 'surprise'; nobody expected this, its traceback is in ")
    [log] = (tmp_path / "out").iterdir()
    assert line.endswith(str(log))
    assert re.fullmatch(r"error-\d{8}-\d{6}-\d+\.log", log.name)
    assert "Traceback (most recent call last)" in log.read_text()
    assert "KeyError: 'surprise'" in log.read_text()


def test_a_log_that_cannot_be_written_there_goes_to_the_folder_for_temporary_files(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    (tmp_path / "temporary").mkdir()
    done = end("unexpected", str(tmp_path / "out"), TMPDIR=str(tmp_path / "temporary"))
    [log] = (tmp_path / "temporary").glob("error-*.log")
    assert str(log) in done.stderr


@pytest.mark.parametrize("kind", ["known", "unexpected"])
def test_tracebacks_are_shown_where_they_are_asked_for(kind: str, tmp_path: Path) -> None:
    done = end(kind, str(tmp_path / "out"), CYTOSSL_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert not (tmp_path / "out").exists()
    if kind == "known":
        assert done.stderr.splitlines()[-1] == "error: a.svs is empty; copy it again"


class Deadly(Dataset):
    """Whose second item ends the process that reads it, or raises."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> int:
        if number == 1 and self.how == "dies":
            os._exit(9)
        if number == 1:
            raise SlideError("b.svs is damaged; leave it out")
        return number


def told(error: BaseException) -> str:
    text = sentence(error)
    assert text is not None
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("dies", r"a process that reads data ended \(DataLoader worker .* exited unexpectedly.*lower num_workers"),
        ("raises", r"^b\.svs is damaged; leave it out$"),
    ],
)
def test_a_loader_process_that_fails_is_one_sentence(how: str, words: str) -> None:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        list(DataLoader(Deadly(how), num_workers=1))
    assert re.search(words, told(caught.value))


def test_memory_that_ran_out_is_one_sentence() -> None:
    advice = r"memory ran out \(.*\); lower batch_size, num_workers or tile_size and start again"
    assert re.fullmatch(advice, told(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)  # PyTorch has no error of its own for it on a CPU
    assert re.fullmatch(advice, told(caught.value))


def test_what_the_terminal_has_not_is_printed_all_the_same() -> None:
    for encoding in ("utf-8", "ascii"):
        done = end("printed", PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stdout, done.stderr) == (0, "M\\udcfcller.svs\n", "")
