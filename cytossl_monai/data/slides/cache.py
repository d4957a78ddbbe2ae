"""Slides from a slow disk, copied ahead to a fast one while others are computed on, and deleted after."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.utils.errors import InputError

__all__ = ["SlideCache", "slide_files"]

logger = logging.getLogger(__name__)

_BLOCK = 1 << 22
_POLL = 0.05
_DIRECT, _READY = ".direct", ".ready"
_OWNER = "owner.lock"


def slide_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that make up a slide: the file; for MRXS and VSI its folder too; for DICOM all files beside it.

    Args:
        path: what the slide table names.
    """
    path = Path(path)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    suffix = path.suffix.lower()
    if suffix == ".dcm":
        return sorted(p for p in path.parent.iterdir() if p.suffix.lower() == ".dcm")
    folders = {".mrxs": path.with_suffix(""), ".vsi": path.with_name(f"_{path.stem}_")}
    folder = folders.get(suffix)
    members = sorted(p for p in folder.rglob("*") if p.is_file()) if folder is not None and folder.is_dir() else []
    return [path, *members]


class SlideCache:
    """Copies slides ahead of their use into a folder on a fast disk; bounded, verified, emptied.

    A copy is read once more and its digest compared with the original's. A slide that does not fit, or whose copy
    fails, is read where it lies; a full cache waits until a slide is done. Everything is told through files, so that
    worker processes need the folder's name only. What a killed run left behind is removed by the next one.

        with SlideCache("/scratch/slides", max_gb=200) as cache:
            cache.start(records)
            for record in records:
                with cache.local(record) as near:
                    ...  # open_record(near)

    Args:
        folder: where to copy to; runs that share it keep apart.
        max_gb: most gigabytes (10^9 bytes) that the copies take at a time.

    Raises:
        InputError: when ``max_gb`` is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], max_gb: float = 100.0) -> None:
        if not max_gb > 0:
            raise InputError(f"slide_cache_gb must be above 0, not {max_gb}; give the gigabytes that copies may take")
        self.folder, self.limit = Path(folder), int(max_gb * 1e9)
        self._run: Path | None = None
        self._owner: int | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None, "_stop": None, "_owner": None}

    # -- the run that fills it ------------------------------------------------------------------------------------

    def __enter__(self) -> SlideCache:
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self.folder)
        self._run = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        self._owner = _hold(self._run / _OWNER)
        self._stop.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop copying and remove what is there. Closing twice is fine."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._run is not None:
            shutil.rmtree(self._run, ignore_errors=True)
            self._run = None
        if self._owner is not None:
            os.close(self._owner)
            self._owner = None

    def start(self, records: Sequence[SlideRecord], needed: Callable[[SlideRecord], bool] | None = None) -> None:
        """Begin to copy, in the order in which the slides will be asked for.

        Args:
            records: the slides.
            needed: whether a slide will be read at all; asked just before it would be copied.

        Raises:
            InputError: when the cache lies on the disk of the slides: copying would read everything twice.
        """
        if self._run is None:
            self.__enter__()
        device = _device(self.folder)
        for record in records:
            if record.path.exists() and _device(record.path) == device:
                raise InputError(
                    f"slide_cache {self.folder} lies on the same disk as {record.path}: copying would only read it "
                    "twice; give a folder on a fast local disk, or no slide_cache"
                )
        self._thread = threading.Thread(
            target=self._fill, args=(list(records), needed), name="slide-cache", daemon=True
        )
        self._thread.start()

    def _fill(self, records: list[SlideRecord], needed: Callable[[SlideRecord], bool] | None) -> None:
        assert self._run is not None
        held: dict[Path, int] = {}
        for record in records:
            target = self._run / record.slide_id
            if self._stop.is_set():
                return
            try:
                if needed is not None and not needed(record):
                    self._mark(record, _DIRECT)
                    continue
                files = slide_files(record.path)
                size = sum(file.stat().st_size for file in files)
                if size > self.limit:
                    logger.warning("%s is larger than the slide cache: it is read where it lies", record.path)
                    self._mark(record, _DIRECT)
                    continue
                while not self._stop.is_set():
                    held = {folder: bytes_ for folder, bytes_ in held.items() if folder.exists()}
                    if sum(held.values()) + size <= self.limit:
                        break
                    self._stop.wait(_POLL)
                held[target] = size
                target.mkdir()
                root = record.path.parent
                for file in files:
                    self._copy(file, target / file.relative_to(root))
                self._mark(record, _READY)
            except _Stopped:
                return
            except Exception as error:  # noqa: BLE001 - whatever fails here, the slide itself can still be read
                logger.warning("%s is read where it lies, it could not be copied (%s)", record.path, error)
                shutil.rmtree(target, ignore_errors=True)
                self._mark(record, _DIRECT)

    def _copy(self, source: Path, target: Path) -> None:
        """Copy and read back: a digest of what was read against one of what was written."""
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.blake2b()
        with open(source, "rb") as reader, open(target, "wb") as writer:
            while block := reader.read(_BLOCK):
                if self._stop.is_set():
                    raise _Stopped
                digest.update(block)
                writer.write(block)
            writer.flush()
            os.fsync(writer.fileno())
            if hasattr(os, "posix_fadvise"):  # so that the disk is read, not the memory that was written from
                os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with open(target, "rb") as copy:
            if hashlib.file_digest(copy, hashlib.blake2b).digest() != digest.digest():
                raise OSError(f"the copy {target} differs from {source}; the cache's disk may be damaged")
        status = source.stat()
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _mark(self, record: SlideRecord, kind: str) -> None:
        assert self._run is not None
        with contextlib.suppress(FileNotFoundError):  # the run ended meanwhile
            (self._run / f"{record.slide_id}{kind}").touch()

    # -- who reads from it ----------------------------------------------------------------------------------------

    def get(self, record: SlideRecord) -> SlideRecord:
        """The record with ``local`` set to its copy, once that is whole; the record itself where there is none.

        Works in worker processes too. Give it back with `release`.
        """
        if self._run is None:
            return record
        while self._run.exists():
            if (self._run / f"{record.slide_id}{_READY}").exists():
                return dataclasses.replace(record, local=self._run / record.slide_id / record.path.name)
            if (self._run / f"{record.slide_id}{_DIRECT}").exists():
                return record
            time.sleep(_POLL)
        return record

    def release(self, record: SlideRecord) -> None:
        """Delete the copy: its place goes to the next slide."""
        if self._run is None:
            return
        self._mark(record, _DIRECT)
        (self._run / f"{record.slide_id}{_READY}").unlink(missing_ok=True)
        shutil.rmtree(self._run / record.slide_id, ignore_errors=True)

    @contextlib.contextmanager
    def local(self, record: SlideRecord) -> Iterator[SlideRecord]:
        """`get` and `release` around a block."""
        try:
            yield self.get(record)
        finally:
            self.release(record)


class _Stopped(Exception):
    """The run ended while a slide was being copied."""


def _device(path: Path) -> int:
    return path.stat().st_dev


def _hold(path: Path) -> int | None:
    """Open and lock a file for as long as this process lives; None where the lock is another's."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_abandoned(folder: Path) -> None:
    """Remove the copies of runs whose process is gone."""
    for run in folder.glob("run-*"):
        owner = run / _OWNER
        if not owner.is_file():
            continue  # just being made
        handle = _hold(owner)
        if handle is not None:
            logger.info("removing %s, which a killed run left behind", run)
            shutil.rmtree(run, ignore_errors=True)
            os.close(handle)
