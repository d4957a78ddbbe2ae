"""One at a time: a file that says who works in a folder or on an item, and that outlives nobody."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from cytossl_monai.utils.errors import InputError
from cytossl_monai.utils.files import process_born

__all__ = ["LOCK_NAME", "FileLock", "LockOwner", "LockedError", "folder_lock", "item_lock", "read_owner"]

logger = logging.getLogger(__name__)

LOCK_NAME = ".cytossl.lock"
"""Name of the lock of a folder."""
_BEAT = 20.0
"""Seconds between two signs of life."""


class LockedError(InputError):
    """Another live process holds the lock. The message says who, where and since when."""


@dataclass(frozen=True)
class LockOwner:
    """Who holds a lock.

    Args:
        user: name of the account.
        host: name of the machine.
        pid: number of the process there.
        born: when the process started, in ticks since the machine did; None where the system does not say. A number of
            a process is given out again, this pair is not.
        since: when the lock was taken, local time as ISO 8601.
        doing: what it is held for.
        token: unlike that of any other lock.
    """

    user: str
    host: str
    pid: int
    born: int | None
    since: str
    doing: str
    token: str

    @classmethod
    def here(cls, doing: str) -> LockOwner:
        """This process, now."""
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        pid = os.getpid()
        return cls(_user(), socket.gethostname(), pid, process_born(pid), since, doing, uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"{self.doing} of {self.user} on {self.host} (process {self.pid}, since {self.since})"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in containers
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def read_owner(path: str | os.PathLike[str]) -> LockOwner | None:
    """Who holds the lock at ``path``; None where there is none, or one that cannot be read (torn by a crash)."""
    try:
        return LockOwner(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class FileLock:
    """A lock that is a file. A live owner renews the file's time; the lock of a dead one is taken over.

    On the owner's machine, dead means that the process is gone. From another machine, it means that the file has not
    been renewed for ``stale_after`` seconds by the file system's own clock.

    Use it as a context manager, or call ``acquire`` and ``release``.

    Args:
        path: the file; its folder is created.
        doing: what it is held for, in a word or two: others are told.
        stale_after: seconds without a sign of life after which an owner on another machine counts as dead.

    Raises:
        LockedError: on entering, when another live process holds it.
    """

    def __init__(self, path: str | os.PathLike[str], doing: str, stale_after: float = 300.0) -> None:
        self.path, self.doing, self.stale_after = Path(path), doing, stale_after
        self.owner: LockOwner | None = None
        self._stop = threading.Event()

    def acquire(self) -> bool:
        """Take the lock if it is free or its owner is dead; whether this process now holds it.

        Raises:
            OSError: when the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(20):
            if self._create():
                self._stop.clear()
                threading.Thread(target=self._renew, name=f"lock {self.path.name}", daemon=True).start()
                return True
            holder = read_owner(self.path)
            if self._alive(holder):
                return False
            self._remove_dead(holder)
        return False

    def release(self) -> None:
        """Give the lock back. Only what this object took is removed; calling it again does nothing."""
        if self.owner is None:
            return
        self._stop.set()
        holder = read_owner(self.path)
        if holder is not None and holder.token == self.owner.token and self.owner.pid == os.getpid():
            self.path.unlink(missing_ok=True)
        self.owner = None

    def __enter__(self) -> FileLock:
        if not self.acquire():
            raise LockedError(
                f"{self.path.parent} is in use by another run: {read_owner(self.path)}; wait for it to end, or give "
                f"another output folder (if it has ended, delete {self.path})"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _create(self) -> bool:
        """Make the file with its content at once: others see it whole or not at all."""
        owner = LockOwner.here(self.doing)
        partial = self.path.with_name(f"{self.path.name}.{owner.token}")
        try:
            partial.write_text(json.dumps(asdict(owner)), encoding="utf-8")
            try:
                os.link(partial, self.path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                try:
                    with open(self.path, "x", encoding="utf-8") as stream:
                        stream.write(json.dumps(asdict(owner)))
                except FileExistsError:
                    return False
        finally:
            partial.unlink(missing_ok=True)
        self.owner = owner
        return True

    def _renew(self) -> None:
        owner = self.owner
        while not self._stop.wait(min(_BEAT, self.stale_after / 4)):
            holder = read_owner(self.path)
            if owner is None or holder is None or holder.token != owner.token:
                return
            with contextlib.suppress(OSError):  # the next beat may get through
                os.utime(self.path)

    def _alive(self, holder: LockOwner | None) -> bool:
        if holder is not None and holder.host == socket.gethostname():
            born = process_born(holder.pid)
            if born is not None or holder.born is not None:
                return born == holder.born
            return _exists(holder.pid)
        try:
            age = self._now() - self.path.stat().st_mtime
        except FileNotFoundError:
            return False
        return age < self.stale_after

    def _now(self) -> float:
        """The file system's clock: that of another machine may be off by minutes."""
        probe = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _remove_dead(self, holder: LockOwner | None) -> None:
        """Put a dead lock aside. If another process took it over in between, its lock is put back."""
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        moved = read_owner(aside)
        if moved is not None and (holder is None or moved.token != holder.token):
            with contextlib.suppress(OSError):
                os.link(aside, self.path)
        elif holder is not None:
            logger.warning("Took over %s: %s ended without giving it back.", self.path, holder)
        aside.unlink(missing_ok=True)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike[str], doing: str, stale_after: float = 300.0) -> Iterator[FileLock]:
    """Hold a folder while a run writes to it.

    Args:
        folder: created where it is missing.
        doing: what is done there, for example ``"pretraining"``.
        stale_after: see ``FileLock``.

    Raises:
        LockedError: when another live process holds it.
    """
    with FileLock(Path(folder) / LOCK_NAME, doing, stale_after) as lock:
        yield lock


@contextlib.contextmanager
def item_lock(
    folder: str | os.PathLike[str], item: str, doing: str, wait: bool = True, poll: float = 0.5
) -> Iterator[FileLock]:
    """Hold one item of a folder, a slide as a rule: two runs that share the folder never do it at the same time.

    Args:
        folder: where the item's files are written; the lock lies in ``.locks`` there.
        item: its name, usable as a file name.
        doing: what is done, for example ``"indexing"``.
        wait: wait for another holder to finish; False raises at once, so that the caller can come back later.
        poll: seconds between two looks.

    Raises:
        LockedError: when another live process holds it and ``wait`` is False.
    """
    lock = FileLock(Path(folder) / ".locks" / item, doing)
    if wait:
        while not lock.acquire():
            time.sleep(poll)
    try:
        with contextlib.nullcontext(lock) if wait else lock:
            yield lock
    finally:
        lock.release()
