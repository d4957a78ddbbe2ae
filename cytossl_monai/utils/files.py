"""Files that are either whole or absent, and fingerprints that tell when one has changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cytossl_monai.utils.errors import CheckpointError, InputError

__all__ = ["atomic_path", "file_fingerprint", "read_torch", "sha256_file", "write_json", "write_text"]

_SAMPLE_BYTES = 1 << 20
_MEMBER_BYTES = 1 << 16


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
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".partial{path.suffix}", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` to ``path`` as indented JSON, atomically.

    Raises:
        ValueError: when ``content`` holds NaN or infinity, which JSON does not know.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


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
        digest.update(f"{member.relative_to(folder)}:{size}".encode())
        with open(member, "rb") as stream:
            digest.update(stream.read(_MEMBER_BYTES))
            stream.seek(max(_MEMBER_BYTES, size - _MEMBER_BYTES))
            digest.update(stream.read(_MEMBER_BYTES))
    return digest.digest()
