"""Copies of slides on a fast disk: verified, bounded, deleted; nothing waits for ever, whatever goes wrong."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest

from cytossl_monai.data import SlideCache, SlideRecord
from cytossl_monai.data.slides import cache as module
from cytossl_monai.data.slides.cache import slide_files
from cytossl_monai.utils import InputError


@pytest.fixture
def records(tmp_path: Path) -> list[SlideRecord]:
    paths = [tmp_path / "slow" / f"s{i}.tif" for i in range(4)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 1000)
    return [SlideRecord(path.stem, path, None, path.stem) for path in paths]


@pytest.fixture
def other_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that the cache takes for another disk."""
    monkeypatch.setattr(module, "_device", lambda path: path.name == "cache")
    return tmp_path / "cache"


def used(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.tif"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # deleted meanwhile
            continue
    return total


def test_slides_are_read_from_copies_that_never_exceed_the_limit(records: list[SlideRecord], other_disk: Path) -> None:
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], used(other_disk))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with SlideCache(other_disk, max_gb=2.5e-6) as cache:
        cache.start(records)
        for record in records:
            with cache.local(record) as near:
                assert near.path == record.path
                assert near.local is not None
                assert near.local.read_bytes() == record.path.read_bytes()
            assert not near.local.exists()
    stop.set()
    watcher.join()
    assert 0 < peak[0] <= 2500
    assert not list(other_disk.iterdir())


def test_a_full_cache_waits_until_a_slide_is_done(records: list[SlideRecord], other_disk: Path) -> None:
    with SlideCache(other_disk, max_gb=1e-6) as cache:
        cache.start(records[:2])
        first = cache.get(records[0])
        results: list[SlideRecord] = []
        waiter = threading.Thread(target=lambda: results.append(cache.get(records[1])))
        waiter.start()
        waiter.join(0.3)
        assert not results
        cache.release(first)
        waiter.join(20)
        assert results[0].local is not None


def test_what_is_too_large_not_needed_or_spoilt_is_read_where_it_lies(
    records: list[SlideRecord], other_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records[0].path.write_bytes(bytes(5000))
    records[2].path.unlink()
    digest = module.hashlib.file_digest
    monkeypatch.setattr(
        module.hashlib,
        "file_digest",
        lambda stream, kind: digest(io.BytesIO() if "s3" in stream.name else stream, kind),
    )
    with SlideCache(other_disk, max_gb=2e-6) as cache:
        cache.start(records, needed=lambda record: record.slide_id != "s1")
        assert [cache.get(record).local for record in records] == [None] * 4
    assert "larger than the slide cache" in caplog.text
    assert "differs from" in caplog.text


def test_a_copy_that_a_killed_run_left_is_removed(records: list[SlideRecord], other_disk: Path) -> None:
    left = other_disk / "run-dead"
    left.mkdir(parents=True)
    (left / "owner.lock").touch()
    (left / "s0.tif").touch()
    with SlideCache(other_disk) as mine:
        assert not left.exists()
        with SlideCache(other_disk):
            assert mine._run is not None
            assert mine._run.exists()


def test_a_cache_on_the_slides_own_disk_and_one_of_no_size_are_refused(
    records: list[SlideRecord], tmp_path: Path
) -> None:
    with SlideCache(tmp_path / "cache") as cache, pytest.raises(InputError, match="lies on the same disk as"):
        cache.start(records)
    with pytest.raises(InputError, match="slide_cache_gb must be above 0"):
        SlideCache(tmp_path, 0)


def test_a_slide_of_many_files_is_copied_whole(tmp_path: Path, other_disk: Path) -> None:
    path = tmp_path / "slow" / "m.mrxs"
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    path.write_text("head")
    (folder / "Data0001.dat").write_text("pixels")
    assert slide_files(path) == [path, folder / "Data0001.dat"]
    record = SlideRecord("m", path, None, "m")
    with SlideCache(other_disk) as cache:
        cache.start([record])
        with cache.local(record) as near:
            assert near.local is not None
            assert (near.local.with_suffix("") / "Data0001.dat").read_text() == "pixels"
