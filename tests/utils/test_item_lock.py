"""A lock for each item of a folder, between processes."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from cytossl_monai.utils import LockedError, item_lock


def _append(folder: Path, name: str) -> None:
    """Read, wait, write: without the lock two processes would lose lines."""
    log = folder / "log.txt"
    for i in range(5):
        with item_lock(folder, "slide", "appending", poll=0.01):
            text = log.read_text() if log.exists() else ""
            time.sleep(0.005)
            log.write_text(text + f"{name}{i}\n")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(tmp_path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = (tmp_path / "log.txt").read_text().split()
    assert sorted(lines) == sorted(f"{name}{i}" for name in "ab" for i in range(5))


def test_a_held_item_is_told_of_and_others_are_free(tmp_path: Path) -> None:
    with item_lock(tmp_path, "slide", "indexing"):
        with item_lock(tmp_path, "other", "indexing", wait=False):
            pass
        with pytest.raises(LockedError, match="indexing"), item_lock(tmp_path, "slide", "embedding", wait=False):
            pass
    with item_lock(tmp_path, "slide", "embedding", wait=False):
        pass
    assert not list((tmp_path / ".locks").iterdir())
