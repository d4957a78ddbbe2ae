"""The tile cache: the same items as without it, read once; never stale ones, never half a write, within its bound."""

from __future__ import annotations

import fcntl
import logging
import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cytossl_monai.data.tiles import cache as module
from cytossl_monai.data.tiles.cache import TileCache
from cytossl_monai.data.tiles.dataset import MixedDataset
from cytossl_monai.data.tiles.images import ImageFolder
from cytossl_monai.utils.errors import InputError

SIZE = 24


def segmenter(images: Tensor, mpp: Tensor) -> Tensor:
    """Dark pixels; counts its calls."""
    segmenter.calls += 1  # type: ignore[attr-defined]
    return images.float().mean(1, keepdim=True) < 100


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(9):
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE + number, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    segmenter.calls = 0  # type: ignore[attr-defined]
    return folder


def tiles(folder: Path, **arguments: Any) -> ImageFolder:
    return ImageFolder(folder, size=SIZE, mpp=0.25, **arguments)


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items())


def test_items_are_those_of_the_data_set_with_their_nuclei(images: Path, tmp_path: Path) -> None:
    plain = tiles(images).__getitems__([(n, 100 + n) for n in range(9)])
    cached = TileCache(tiles(images), tmp_path / "cache", segmenter=segmenter)
    for _ in range(3):
        for item, expected in zip(cached.__getitems__([(n, 100 + n) for n in range(9)]), plain, strict=True):
            nuclei = item.pop("nuclei")
            assert equal(item, expected)
            assert type(item["mpp"]) is np.float32
            mask = segmenter(expected["image"][None], torch.tensor([0.25]))[0]
            assert torch.equal(nuclei, mask.to(torch.uint8))
    assert len(cached) == 9
    assert np.array_equal(cached.groups, tiles(images).groups)


def test_each_tile_is_read_once_by_all_processes(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = TileCache(tiles(images), tmp_path / "cache", segmenter=segmenter)
    expected = first.__getitems__(list(range(9)))
    again = TileCache(tiles(images), tmp_path / "cache", segmenter=segmenter)  # a later run
    worker = pickle.loads(pickle.dumps(again))  # a worker process's copy
    reader = type(again.dataset)
    read: list[int] = []
    real = reader._read
    monkeypatch.setattr(reader, "_read", lambda self, number: (read.append(number), real(self, number))[1])
    calls = segmenter.calls  # type: ignore[attr-defined]
    for source in (again, worker):
        assert all(equal(a, b) for a, b in zip(source.__getitems__(list(range(9))), expected, strict=True))
    assert read == []
    assert segmenter.calls == calls  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", ["pixels", "scale", "places", "program", "nuclei"])
def test_a_stale_cache_is_never_used(
    change: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TileCache(tiles(images), tmp_path / "cache", segmenter=segmenter).__getitems__(list(range(9)))
    arguments: dict[str, Any] = {"segmenter": segmenter}
    dataset = tiles(images)
    if change == "pixels":
        Image.fromarray(np.zeros((SIZE, SIZE, 3), dtype=np.uint8)).save(images / "4.png")
    elif change == "scale":
        dataset = ImageFolder(images, size=SIZE, mpp=0.5)
    elif change == "places":
        (images / "0.png").unlink()
        dataset = tiles(images)
    elif change == "program":
        monkeypatch.setattr(module, "_sources_digest", lambda: "another")
    else:
        arguments = {"segmenter": lambda images, mpp: images[:, :1] >= 0}
    changed = TileCache(dataset, tmp_path / "cache", **arguments)
    for number in range(len(dataset)):
        fresh = TileCache(dataset, None, **arguments)[number]
        assert equal(changed[number], fresh), number


@pytest.mark.parametrize("damage", ["half", "shorter"])
def test_a_slot_half_written_is_made_again(damage: str, images: Path, tmp_path: Path) -> None:
    cached = TileCache(tiles(images), tmp_path / "cache", segmenter=segmenter)
    expected = cached.__getitems__(list(range(9)))
    slots = next((tmp_path / "cache").glob("*/slots.bin"))
    content = bytearray(slots.read_bytes())
    if damage == "half":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        slots.write_bytes(content)
    else:
        del cached
        slots.write_bytes(content[: len(content) // 3])
    again = TileCache(tiles(images), tmp_path / "cache", segmenter=segmenter)
    for _ in range(2):
        assert all(equal(a, b) for a, b in zip(again.__getitems__(list(range(9))), expected, strict=True))


def test_it_keeps_to_its_bound_and_spreads_it(images: Path, tmp_path: Path) -> None:
    one = 4 + 3 * SIZE**2 + SIZE**2 // 8 + 4
    cached = TileCache(tiles(images), tmp_path / "cache", max_gb=4.5 * one / (1 << 30), segmenter=segmenter)
    for _ in range(2):
        assert all(
            equal(a, b)
            for a, b in zip(
                cached.__getitems__(list(range(9))),
                TileCache(tiles(images), None, segmenter=segmenter).__getitems__(list(range(9))),
                strict=True,
            )
        )
    kept = [number for number in range(9) if cached._slot(number) is not None]
    assert len(kept) == 4
    assert max(np.diff([0, *kept, 9])) <= 3
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.bin")) <= 4.5 * one


def test_an_old_cache_goes_for_a_new_one_unless_a_run_uses_it(images: Path, tmp_path: Path) -> None:
    one = 4 + 3 * SIZE**2 + SIZE**2 // 8 + 4
    bound = {"max_gb": 9.5 * one / (1 << 30), "segmenter": segmenter}
    used = TileCache(tiles(images), tmp_path / "cache", **bound)  # type: ignore[arg-type]
    folder = used.folder
    TileCache(ImageFolder(images, size=SIZE, mpp=0.5), tmp_path / "cache", **bound)  # type: ignore[arg-type]
    assert folder is not None
    assert folder.exists()
    assert used._lock is not None
    used._lock.close()
    TileCache(ImageFolder(images, size=SIZE, mpp=0.7), tmp_path / "cache", **bound)  # type: ignore[arg-type]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_two_processes_that_make_room_at_once_both_get_their_cache(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other one removes the old cache while this one looks how large it is."""
    old = TileCache(tiles(images), tmp_path / "cache")
    assert old.folder is not None
    assert old._lock is not None
    old._lock.close()
    gone = old.folder
    iterdir = Path.iterdir

    def removed_meanwhile(folder: Path) -> Any:
        if folder == gone and gone.exists():
            found = list(iterdir(folder))
            shutil.rmtree(gone)
            return iter(found)
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", removed_meanwhile)
    cached = TileCache(ImageFolder(images, size=SIZE, mpp=0.7), tmp_path / "cache", max_gb=1.5e-5)
    assert not gone.exists()
    assert cached.folder is not None, caplog.text


def test_a_cache_in_use_stays_on_nfs(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, flock(2) is a lock of byte ranges: a shared one needs a file that is open for reading."""
    flock = fcntl.flock

    def by_ranges(file: Any, operation: int) -> None:
        if operation & fcntl.LOCK_SH and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
            raise OSError(9, "Bad file descriptor")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", by_ranges)
    used = TileCache(tiles(images), tmp_path / "cache")
    TileCache(ImageFolder(images, size=SIZE, mpp=0.7), tmp_path / "cache", max_gb=1.5e-5)
    assert used.folder is not None
    assert used.folder.exists()


def test_a_cache_that_is_being_removed_is_waited_for_and_made_anew(images: Path, tmp_path: Path) -> None:
    old = TileCache(tiles(images), tmp_path / "cache")
    assert old.folder is not None
    assert old._lock is not None
    old._lock.close()
    made: list[TileCache] = []
    starting = threading.Thread(target=lambda: made.append(TileCache(tiles(images), tmp_path / "cache")))
    with open(old.folder / "in_use", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the run does that removes it
        starting.start()
        starting.join(0.3)
        shutil.rmtree(old.folder)
    starting.join(30)
    assert made[0].folder == old.folder
    assert equal(made[0][3], tiles(images)[3])  # written
    assert equal(made[0][3], tiles(images)[3])  # read


def test_a_full_disk_gets_a_sentence_and_the_run_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level(logging.WARNING):
        cached = TileCache(tiles(images), tmp_path / "cache", segmenter=segmenter)
    assert "No space left on device" in caplog.text
    assert "smaller max_gb" in caplog.text
    assert equal(cached[3], TileCache(tiles(images), None, segmenter=segmenter)[3])


def test_room_is_reserved_where_the_c_library_does_it_by_writing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS before 4.2: posix_fallocate(3) refuses a file that is open for appending, or for writing alone."""

    def emulated(file: int, offset: int, size: int) -> None:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if flags & os.O_APPEND or flags & os.O_ACCMODE != os.O_RDWR:
            raise OSError(9, "Bad file descriptor")
        os.truncate(file, max(os.fstat(file).st_size, offset + size))

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    cached = TileCache(tiles(images), tmp_path / "cache", segmenter=segmenter)
    assert not caplog.records
    assert cached.folder is not None
    assert equal(cached[3], TileCache(tiles(images), None, segmenter=segmenter)[3])


def test_a_folder_that_cannot_be_written_gets_the_same(images: Path, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "cache").write_text("a file")
    cached = TileCache(tiles(images), tmp_path / "cache", segmenter=segmenter)
    assert "no tiles are cached" in caplog.text
    assert len(cached.__getitems__([0, 1])) == 2


def test_random_transforms_run_on_what_comes_out(images: Path, tmp_path: Path) -> None:
    cached = TileCache(
        tiles(images, transform=lambda item: {**item, "image": item["image"] + item["sample"]}),
        tmp_path / "cache",
        segmenter=segmenter,
    )
    plain = tiles(images)[2]["image"]
    for sample in (0, 1, 7):
        assert torch.equal(cached.__getitems__([(2, sample)])[0]["image"], plain + sample)


def test_mixed_sources_and_tiles_of_another_size(images: Path, tmp_path: Path) -> None:
    mixed = MixedDataset([tiles(images), tiles(images)])
    cached = TileCache(mixed, tmp_path / "cache")
    expected = MixedDataset([tiles(images), tiles(images)]).__getitems__(list(range(18)))
    for _ in range(2):
        assert all(equal(a, b) for a, b in zip(cached.__getitems__(list(range(18))), expected, strict=True))
    drawing = MixedDataset([tiles(images), tiles(images, transform=lambda item: item)])
    with pytest.raises(ValueError, match="give the transform to the MixedDataset"):  # else drawn once and for all
        TileCache(drawing, tmp_path / "cache")
    uneven = MixedDataset([tiles(images), ImageFolder(images, size=SIZE * 2, mpp=0.25)])
    with pytest.raises(InputError, match="the cache holds tiles of 24 px"):
        TileCache(uneven, tmp_path / "cache")[12]
    with pytest.raises(ValueError, match="max_gb must be above 0"):
        TileCache(tiles(images), tmp_path / "cache", max_gb=0)
