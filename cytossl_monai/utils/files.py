"""Files that are either whole or absent, and fingerprints that tell when one has changed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cytossl_monai.utils.errors import CheckpointError, InputError, OutputError, reason

__all__ = [
    "atomic_path",
    "encodable",
    "file_fingerprint",
    "process_born",
    "read_json",
    "read_torch",
    "read_yaml",
    "remove_partials",
    "require_writable",
    "sha256_file",
    "visible_files",
    "write_json",
    "write_text",
    "writing",
]

_SAMPLE_BYTES = 1 << 20
_MEMBER_BYTES = 1 << 16
_DAY = 86400.0
_PARTIAL = re.compile(r"\.(?P<pid>\d+)-(?P<born>\d+|None)-(?P<host>.+)\.partial(\.[^.]*)?$")
_CLEANED: set[Path] = set()
_REASONS = {
    errno.ENOSPC: "the disk is full; make room, or give another folder, and start again",
    errno.EDQUOT: "the quota is used up; make room, or give another folder, and start again",
    errno.EFBIG: "the file would be larger than the system allows; give another folder, and start again",
    errno.EROFS: "the file system is read-only; give another folder",
    errno.EACCES: "you may not write there; give another folder, or ask for the right to",
    errno.EPERM: "you may not write there; give another folder, or ask for the right to",
    errno.ENOTDIR: "a part of the path is a file; give another folder",
    errno.EEXIST: "a file lies where the folder should be; give another folder",
    errno.EISDIR: "a folder of that name lies there; give another name, or move it",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.EIO: "the disk reports a fault; give another folder, and have the disk looked at",
    errno.ESTALE: "the network share is gone; mount it again, and start again",
}
"""What the system says of a path that cannot be written, and what to do about it."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed to disk and renamed, on failure removed.

    A killed process or a full disk leaves the old file, or none: never half of a new one.

    Args:
        path: final path. Its folder is created.

    Yields:
        a temporary path in the same folder with the same suffix, to be written by the caller.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(path.parent)
        owner = f"{os.getpid()}-{process_born(os.getpid())}-{socket.gethostname()}"
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem[:80]}.", suffix=f".{owner}.partial{path.suffix}", dir=path.parent
        )
        os.close(handle)
    partial = Path(name)
    try:
        with writing(path):
            yield partial
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            # mkstemp makes private files; the result gets the permissions that open() would have given.
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o666 & ~umask)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the system says when ``path`` cannot be written into one sentence.

    Libraries hide a full disk behind errors of their own (PyTorch: a RuntimeError without a reason), so the disk itself
    is asked.

    Raises:
        OutputError: names the path, what is wrong and what to do.
    """
    path = Path(path)
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if error.errno not in _REASONS or not _is_about(error, path):
            raise
        raise OutputError(f"cannot write {path}: {_REASONS[error.errno]}") from error
    except Exception as error:
        if not _is_full(path):
            raise
        raise OutputError(f"cannot write {path}: {_REASONS[errno.ENOSPC]}") from error


def _is_about(error: OSError, path: Path) -> bool:
    """Whether an error is about the output (which libraries often do not name), not about a file that is read."""
    if error.filename is None:
        return True
    named = Path(os.fsdecode(error.filename))
    return named in (path, *path.parents) or named.parent == path.parent


def _is_full(path: Path) -> bool:
    folder = next((parent for parent in path.parents if parent.is_dir()), None)
    return folder is not None and shutil.disk_usage(folder).free < _SAMPLE_BYTES


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Check before a run that its output folder can be made and written to. Nothing is made.

    Raises:
        OutputError: when it cannot; names the folder, what is wrong and what to do.
    """
    folder = Path(folder)
    with writing(folder / "*"):
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(parent))
        if not existing.is_dir():
            raise OutputError(f"cannot write to {folder}: {existing} is a file; give another folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            code = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
            raise OutputError(f"cannot write to {folder}: {_REASONS[code]}")
    if _is_full(existing / "*"):
        raise OutputError(f"cannot write to {folder}: {_REASONS[errno.ENOSPC]}")


def visible_files(folder: str | os.PathLike[str], pattern: str) -> list[Path]:
    """Files of a folder that match a pattern, sorted; without those whose name begins with a dot.

    ``Path.glob`` gives these too, and a killed run leaves some that are half a file.
    """
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))


def remove_partials(folder: str | os.PathLike[str]) -> None:
    """Remove the unfinished files that dead processes left in a folder; looks once a process and folder.

    Those of a live process stay; so do those of another machine that are younger than a day.
    """
    folder = Path(folder).resolve()
    if folder in _CLEANED:
        return
    _CLEANED.add(folder)
    for path in folder.glob(".*.partial*"):
        owner = _PARTIAL.search(path.name)
        with contextlib.suppress(OSError):  # another process may remove it at the same moment
            if owner is not None and owner["host"] == socket.gethostname():
                is_dead = str(process_born(int(owner["pid"]))) != owner["born"]
            else:
                is_dead = time.time() - path.stat().st_mtime > _DAY
            if is_dead:
                path.unlink()
                logger.info("Removed %s: a run that was killed left it.", path)


def process_born(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did: its number is given out again, this pair is not.

    Returns:
        field 22 of ``/proc/<pid>/stat``; None where there is no such process, or no such file system.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def encodable(text: str) -> str:
    """Text that any file, page or terminal in UTF-8 takes.

    Python hands on the bytes of a file name, or of another tool's text, that are not UTF-8 as halves of characters,
    which nothing can write. They become ``\\udcfc`` (an escape that JSON knows too); all else stays.
    """
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically; what UTF-8 has not is written as by ``encodable``."""
    with atomic_path(path) as partial:
        partial.write_text(encodable(text), encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` to ``path`` as indented JSON, atomically.

    Raises:
        ValueError: when ``content`` holds NaN or infinity, which JSON does not know.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], advice: str, kind: type[InputError] = InputError) -> Any:
    """Read a JSON file that a user gave, with or without a byte-order mark.

    Args:
        path: the file.
        advice: what to do about one that cannot be read.
        kind: of the error that is raised then.

    Raises:
        InputError: when it is missing, no text, no JSON, or nested beyond all measure; of the kind asked for.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise kind(f"{path} cannot be read as JSON ({reason(error)}); {advice}") from error


def read_yaml(path: str | os.PathLike[str], advice: str, kind: type[InputError] = InputError) -> Any:
    """Read a YAML file that a user gave, see ``read_json``. Nothing in it is executed."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise kind(f"{path} cannot be read as YAML ({reason(error)}); {advice}") from error


def read_torch(path: str | os.PathLike[str], what: str, device: Any = "cpu") -> Any:
    """Read what ``torch.save`` wrote: tensors, numbers, text, lists and dictionaries. Nothing in the file is executed.

    Args:
        path: the file.
        what: what it should be, for the message: "an encoder", "a checkpoint".
        device: where tensors go.

    Raises:
        CheckpointError: when it is missing, no file, damaged, or holds more than plain data.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        kind = "a folder, no file" if path.is_dir() else "no plain file" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: {kind}; give {what} file that a run wrote")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a file of random bytes makes the unpickler raise nearly anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise CheckpointError(
            f"{path}: cannot be read as {what} file, it is damaged or holds more than weights ({first}); get it again"
        ) from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a whole file, in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """A short digest of a file's size, first and last mebibyte: cheap on a slide of many gigabytes.

    A directory (MRXS data, DICOM series) is digested by the names, sizes, first and last 64 KiB of what it holds.

    Returns:
        16 hexadecimal digits. A copy of the file has the same ones; the modification time does not count.

    Raises:
        InputError: when the path is neither file nor folder, but a pipe that would never end, or a device.
    """
    path = Path(path)
    if path.is_dir():
        return _folder_digest(path).hex()[:16]
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file (a pipe, socket or device); give a file")
    digest = hashlib.sha256()
    size = path.stat().st_size
    digest.update(str(size).encode())
    with open(path, "rb") as stream:
        if size <= 2 * _SAMPLE_BYTES:
            digest.update(stream.read())
        else:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(-_SAMPLE_BYTES, os.SEEK_END)
            digest.update(stream.read(_SAMPLE_BYTES))
    # A MIRAX slide is its folder of the same name; the .mrxs file is a picture of the label.
    if path.suffix.lower() == ".mrxs" and path.with_suffix("").is_dir():
        digest.update(_folder_digest(path.with_suffix("")))
    return digest.hexdigest()[:16]


def _folder_digest(folder: Path) -> bytes:
    """Digest of the names, sizes, first and last 64 KiB of a folder's files."""
    digest = hashlib.sha256()
    for member in sorted(folder.rglob("*")):
        if not member.is_file():
            continue
        size = member.stat().st_size
        digest.update(encodable(f"{member.relative_to(folder)}:{size}").encode())
        with open(member, "rb") as stream:
            digest.update(stream.read(_MEMBER_BYTES))
            stream.seek(max(_MEMBER_BYTES, size - _MEMBER_BYTES))
            digest.update(stream.read(_MEMBER_BYTES))
    return digest.digest()
