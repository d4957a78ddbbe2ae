"""Decoded tiles and their nuclei, kept on disk: read and found once, then mapped into memory by every process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import cytossl_monai
from cytossl_monai.data.tiles.dataset import Item, Key, apply_transform, split_keys
from cytossl_monai.utils.errors import InputError
from cytossl_monai.utils.files import encodable, file_fingerprint, write_json

__all__ = ["TileCache"]

logger = logging.getLogger(__name__)
_VERSION = 1
_CHECK_BYTES = 4  # a CRC-32 a slot; 0 marks an empty one
_MPP_BYTES = 4  # float32, before the colours
_GIB = 1 << 30


class TileCache(Dataset[Item]):
    """A data set of tiles whose items are read once, and come from a memory map after that.

    On a machine with few cores, decoding tiles and finding their nuclei takes as long as training on them. Neither
    changes from epoch to epoch: only the views do, which are cut from the tile and its mask anew. The map is shared by
    all worker processes, and the operating system holds in memory what fits.

    A cache is used only for what it was made of: a digest of every file (size, first and last mebibyte), place, size
    and scale, of the program that finds nuclei and of its version names the folder, so that other tiles get another
    one. Each slot carries a checksum; one that was half written is made again. Files under ``folder`` can be deleted at
    any time that no run uses them.

    Items are those of ``dataset``, with ``nuclei`` uint8 (1, H, W), 1 in a nucleus, where there is a ``segmenter`` and
    the data set brings no nuclei of its own. The
    transform of ``dataset`` is taken over and runs on what comes out of the cache, so that it may be random.

    Args:
        dataset: a ``TileDataset``, ``ImageFolder`` or ``MixedDataset`` whose images are all of one size.
        folder: where to keep caches. None: keep nothing, and hand ``dataset`` through.
        max_gb: the most that the caches in ``folder`` may take, in GiB: those of other tiles that no run uses are
            removed for this one, the oldest first. Where it holds less than all tiles, every so many are kept, evenly
            over the data set, and the others read as before.
        segmenter: ``(images, mpp) -> (B, 1, H, W) bool``, whose nuclei are kept too, such as
            `cytossl_monai.transforms.nuclei_mask`; None: none are.

    Raises:
        ValueError: for a size that is not above zero, or a ``MixedDataset`` whose sources have transforms of their own.
    """

    def __init__(
        self,
        dataset: Any,
        folder: str | os.PathLike[str] | None,
        max_gb: float = 4.0,
        segmenter: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if not max_gb > 0:
            raise ValueError(f"max_gb must be above 0, got {max_gb}; set folder to null to keep nothing")
        sources: Sequence[Any] = getattr(dataset, "sources", ())
        if folder is not None and any(getattr(source, "transform", None) is not None for source in sources):
            raise ValueError(
                "a source of the MixedDataset has a transform, whose result would be kept and drawn no more; give the "
                "transform to the MixedDataset, or set folder to null to keep nothing"
            )
        self.dataset = dataset
        self.transform: Callable[[Item], Item] | None = dataset.transform
        dataset.transform = None
        self.segmenter = None if self.knows_nuclei else segmenter
        self.folder: Path | None = None
        self.capacity = 0
        self._maps: tuple[int, np.memmap, np.memmap] | None = None
        self._lock: IO[bytes] | None = None
        self.side = 0
        if folder is not None and len(dataset):
            self._prepare(Path(folder), max_gb)

    @property
    def groups(self) -> np.ndarray:
        """As ``dataset.groups``."""
        return np.asarray(self.dataset.groups)

    @property
    def weights(self) -> np.ndarray | None:
        """As ``dataset.weights``."""
        weights: np.ndarray | None = self.dataset.weights
        return weights

    @property
    def knows_nuclei(self) -> bool:
        """Whether the data set itself brings nuclei, which are not looked for then."""
        return bool(getattr(self.dataset, "knows_nuclei", False))

    def tile_um(self) -> float:
        """Side of a tile in um, as the data set behind it says."""
        return float(self.dataset.tile_um())

    def __len__(self) -> int:
        return len(self.dataset)

    # -- the files ---------------------------------------------------------------------------------------------------

    def _prepare(self, folder: Path, max_gb: float) -> None:
        """Make or find the cache's folder; where the disk has no room, say so and go on without."""
        try:
            self.side = int(self.dataset[0]["image"].shape[-1])
            self.capacity = min(len(self.dataset), int(max_gb * _GIB) // (self._slot_bytes + _CHECK_BYTES))
            if self.capacity == 0:
                logger.warning("no tile of %d px fits max_gb=%g; nothing is cached", self.side, max_gb)
                return
            self.folder = folder / self._digest()
            self._lock = _in_use(self.folder)
            _make_room(folder, self.folder, int(max_gb * _GIB) - self.capacity * (self._slot_bytes + _CHECK_BYTES))
            for name, bytes_each in (("slots.bin", self._slot_bytes), ("checks.bin", _CHECK_BYTES)):
                _reserve(self.folder / name, self.capacity * bytes_each)
            about = {"version": _VERSION, "tiles": len(self.dataset), "slots": self.capacity, "side": self.side}
            write_json(self.folder / "cache.json", about)
        except OSError as error:
            needed = self.capacity * (self._slot_bytes + _CHECK_BYTES) / _GIB
            logger.warning(
                "no tiles are cached: %s cannot hold %.2f GiB (%s); free space, set another folder or a smaller max_gb",
                folder,
                needed,
                error.strerror or error,
            )
            self.folder, self.capacity = None, 0

    def _digest(self) -> str:
        """16 hexadecimal digits that change whenever a cached tile or mask could differ."""
        digest = hashlib.sha256()
        parts = [_VERSION, cytossl_monai.__version__, self.side, self.capacity, self.segmenter is not None]
        if self.segmenter is not None:
            parts += [getattr(self.segmenter, "__module__", ""), getattr(self.segmenter, "__qualname__", "")]
            parts.append(_sources_digest())
        digest.update(json.dumps(parts).encode())
        _describe(self.dataset, digest.update)
        return digest.hexdigest()[:16]

    @property
    def _slot_bytes(self) -> int:
        pixels = self.side * self.side
        return _MPP_BYTES + 3 * pixels + (-(-pixels // 8) if self.segmenter is not None else 0)

    def _open(self) -> tuple[np.memmap, np.memmap]:
        """The maps of this process: slots (capacity, bytes) uint8 and checks (capacity,) uint32."""
        if self._maps is None or self._maps[0] != os.getpid():
            assert self.folder is not None
            slots = np.memmap(self.folder / "slots.bin", np.uint8, "r+", shape=(self.capacity, self._slot_bytes))
            checks = np.memmap(self.folder / "checks.bin", np.uint32, "r+", shape=(self.capacity,))
            self._maps = os.getpid(), slots, checks
        return self._maps[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None, "_lock": None}  # both are of one process

    def _slot(self, item: int) -> int | None:
        """The slot of an item, or None: slots are spread evenly over the items."""
        slot = item * self.capacity // len(self.dataset)
        if self.capacity == 0 or (item > 0 and (item - 1) * self.capacity // len(self.dataset) == slot):
            return None
        return slot

    # -- items -------------------------------------------------------------------------------------------------------

    def __getitems__(self, keys: Sequence[Key]) -> list[Item]:
        """Many items: those that the cache holds from there, the others in one call of ``dataset``."""
        numbers, samples = split_keys(keys)
        found: list[Item | None] = [self._look_up(int(n)) for n in numbers]
        absent = [place for place, content in enumerate(found) if content is None]
        items: list[Item | None] = [None] * len(numbers)
        if absent:
            wanted = [(int(numbers[place]), int(samples[place])) for place in absent]
            read = self.dataset.__getitems__(wanted)
            masks = self._find_nuclei(read) if self.segmenter is not None else [None] * len(read)
            for place, item, mask in zip(absent, read, masks, strict=True):
                self._store(int(numbers[place]), item["image"].numpy(), float(item["mpp"]), mask)
                items[place] = item if mask is None else {**item, "nuclei": torch.from_numpy(mask)[None]}
        for place, content in enumerate(found):
            if content is not None:
                items[place] = {**content, **self.dataset.about(int(numbers[place]), int(samples[place]))}
        return apply_transform(self.transform, [item for item in items if item is not None])

    def __getitem__(self, key: Key) -> Item:
        return self.__getitems__([key])[0]

    def _find_nuclei(self, items: Sequence[Item]) -> list[np.ndarray]:
        images = torch.stack([item["image"] for item in items])
        mpp = torch.tensor([float(item["mpp"]) for item in items])
        assert self.segmenter is not None
        return list(self.segmenter(images, mpp)[:, 0].to(torch.uint8).numpy())

    def _look_up(self, number: int) -> Item | None:
        """``image``, ``mpp`` and ``nuclei`` of a slot, as copies, or None where it is empty or damaged."""
        slot = self._slot(number) if self.folder is not None else None
        if slot is None:
            return None
        slots, checks = self._open()
        content, check = np.array(slots[slot]), int(checks[slot])
        if check == 0 or check != _checksum(content):
            return None
        pixels = self.side * self.side
        image = content[_MPP_BYTES : _MPP_BYTES + 3 * pixels].reshape(3, self.side, self.side)
        item: Item = {"image": torch.from_numpy(image), "mpp": content[:_MPP_BYTES].view(np.float32)[0]}
        if self.segmenter is not None:
            mask = np.unpackbits(content[_MPP_BYTES + 3 * pixels :], count=pixels)
            item["nuclei"] = torch.from_numpy(mask.reshape(1, self.side, self.side))
        return item

    def _store(self, number: int, image: np.ndarray, mpp: float, mask: np.ndarray | None) -> None:
        slot = self._slot(number) if self.folder is not None else None
        if slot is None:
            return
        if image.shape != (3, self.side, self.side):
            raise InputError(
                f"tile {number} is {image.shape[-1]} px, the cache holds tiles of {self.side} px; set one tile_size"
            )
        parts = [np.array([mpp], dtype=np.float32).view(np.uint8), image.reshape(-1)]
        if mask is not None:
            parts.append(np.packbits(mask.reshape(-1)))
        content = np.concatenate(parts)
        slots, checks = self._open()
        slots[slot] = content
        checks[slot] = _checksum(content)


def _checksum(content: np.ndarray) -> int:
    return zlib.crc32(content.tobytes()) or 1


def _in_use(folder: Path) -> IO[bytes]:
    """Make a cache's folder, with a lock that says that a run uses it; the lock goes with the process."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # For reading too: NFS locks by ranges, where a shared lock asks for that.
            lock = open(folder / "in_use", "a+b")  # noqa: SIM115 - held as long as the data set lives
        except FileNotFoundError:  # another run has removed the folder in between
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)  # waits for a run that is just removing this cache
        except OSError:  # a file system without locks: nothing is removed from it then
            return lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "in_use")):
                return lock
        lock.close()


def _make_room(folder: Path, own: Path, allowed: int) -> None:
    """Remove other caches that no run uses, the oldest first, until they take ``allowed`` bytes at most."""
    others: list[tuple[float, Path, int]] = []
    for about in folder.glob("*/cache.json"):
        if about.parent != own:
            with contextlib.suppress(FileNotFoundError):  # another process of this training is just removing it
                size = sum(part.stat().st_size for part in about.parent.iterdir())
                others.append((about.stat().st_mtime, about.parent, size))
    taken = sum(size for _, _, size in others)
    for _, path, size in sorted(others):
        if taken <= allowed:
            return
        try:
            with open(path / "in_use", "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                logger.info("tile cache %s is removed: no run uses it", path)
                shutil.rmtree(path)
        except FileNotFoundError:
            pass  # removed by another process
        except OSError:
            continue  # another run uses it
        taken -= size


def _reserve(path: Path, size: int) -> None:
    """A file of ``size`` bytes whose blocks exist: writing through a map into a hole on a full disk kills the process.

    Raises:
        OSError: where there is no room; what was there before is left.
    """
    # Not for appending: where a file system cannot reserve (NFS before 4.2), the C library does it by writing, and
    # refuses files that are open so.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        had = os.fstat(file).st_size
        try:
            os.posix_fallocate(file, 0, size)
        except OSError:
            os.ftruncate(file, had)
            raise
    finally:
        os.close(file)


def _describe(dataset: Any, update: Callable[[bytes], Any]) -> None:
    """Feed what an item depends on into a digest: files by their content, and every place, size and scale."""
    sources: Sequence[Any] = getattr(dataset, "sources", ())
    for source in sources:
        _describe(source, update)
    if sources:
        return
    described: Mapping[str, Any] = dataset.cache_key()
    for path in described["files"]:
        update(encodable(f"{path}:{file_fingerprint(path)}").encode())
    for array in described["arrays"]:
        update(np.ascontiguousarray(array).tobytes())
    update(json.dumps(described["settings"], sort_keys=True, default=str).encode())


def _sources_digest() -> str:
    """A digest of the program that finds nuclei: a cache of an older one is not used."""
    digest = hashlib.sha256()
    for path in sorted((Path(cytossl_monai.__file__).parent / "transforms").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
