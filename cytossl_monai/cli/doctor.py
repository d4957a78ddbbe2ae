"""``cytossl doctor``: what this machine can do, what is wrong with it, and what will be done with a slide."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cytossl_monai import __version__
from cytossl_monai.utils.errors import InputError, SlideError, first_line

__all__ = ["Finding", "decodable", "doctor", "examine_disk", "examine_machine", "examine_slide"]

_MARKS = {"ok": "ok  ", "note": "note", "wrong": "BAD "}
_GB = 1e9
_COMPRESSIONS = ("none", "jpeg", "deflate", "lzw", "jpeg2000", "webp", "zstd")


@dataclass(frozen=True)
class Finding:
    """One line of what the doctor says.

    Args:
        subject: what it is about.
        says: what was found and, where that is not in order, what to do.
        state: ``ok``, ``note`` (works, but worth knowing) or ``wrong`` (something will fail).
    """

    subject: str
    says: str
    state: Literal["ok", "note", "wrong"] = "ok"


def examine_machine() -> Iterator[Finding]:
    """Python, libraries, GPU and memory."""
    old = sys.version_info < (3, 11)
    yield Finding(
        "Python",
        f"{platform.python_version()} on {platform.platform()}" + ("; it must be 3.11 or later" if old else ""),
        "wrong" if old else "ok",
    )
    yield Finding("cytossl-monai", __version__)
    import monai
    import torch

    yield Finding("torch, MONAI", f"{torch.__version__}, {monai.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            yield Finding(f"GPU {i}", f"{card.name}, {card.total_memory / _GB:.0f} GB, CUDA {torch.version.cuda}")
    else:
        built = "has no CUDA in it" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        yield Finding("GPU", f"none is usable (this torch {built}): everything runs on the CPU", "note")
    yield from _memory()


def _memory() -> Iterator[Finding]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split()[1].isdigit()}
    free, cores = table.get("MemAvailable", 0), len(os.sched_getaffinity(0))
    scarce = free < 1.5 * _GB * cores
    yield Finding(
        "memory",
        f"{free / _GB:.1f} of {table['MemTotal'] / _GB:.1f} GB free for {cores} cores"
        + ("; give --num_workers so that each has 1.5 GB" if scarce else ""),
        "note" if scarce else "ok",
    )
    shm = Path("/dev/shm")
    if shm.is_dir():
        space = shutil.disk_usage(shm)
        small = space.free < 1 * _GB
        yield Finding(
            "/dev/shm",
            f"{space.free / _GB:.1f} GB free"
            + (
                "; loaders of training pass batches through it: docker run --shm-size 8g, or --num_workers 0"
                if small
                else ""
            ),
            "wrong" if space.free < 0.1 * _GB else "note" if small else "ok",
        )


def decodable(folder: Path) -> dict[str, dict[str, str]]:
    """What each reader really decodes here: a small picture is written in every compression and read back.

    Returns:
        reader -> compression -> ``yes``, or why not.
    """
    import tifffile

    from cytossl_monai.data.slides.probes import probe
    from cytossl_monai.data.slides.readers.base import BackendError
    from cytossl_monai.data.slides.slide import BACKENDS

    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    picture = np.stack([np.tile(ramp, (256, 1)), np.tile(ramp[:, None], (1, 256)), np.full((256, 256), 128)], -1)
    picture = np.ascontiguousarray(picture.astype(np.uint8))
    results: dict[str, dict[str, str]] = {name: {} for name in BACKENDS}
    for compression in _COMPRESSIONS:
        path = folder / f"{compression}.tif"
        try:
            tifffile.imwrite(
                path,
                picture,
                tile=(256, 256),
                photometric="rgb",
                compression=None if compression == "none" else compression,
                resolution=(40000, 40000),
                resolutionunit="CENTIMETER",
            )
        except Exception as error:  # noqa: BLE001 - every codec has an error class of its own
            for name in results:
                results[name][compression] = f"not tried, it cannot be written here: {error}"
            continue
        for name, kind in BACKENDS.items():
            results[name][compression] = "yes"
            try:
                backend = kind(path)
            except BackendError as error:
                results[name][compression] = first_line(error, 80)
                continue
            try:
                seen = probe(backend)[0][1].astype(int)
                middle = picture[96:160, 96:160].astype(int)
                if np.abs(seen - middle).mean() > 4:
                    results[name][compression] = "decodes other pixels"
            except BackendError as error:
                results[name][compression] = first_line(error, 80)
            finally:
                backend.close()
    return results


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Native libraries print to the terminal what they cannot do; the doctor says it in its own table."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def examine_readers() -> Iterator[Finding]:
    """The readers, by what they decode."""
    with tempfile.TemporaryDirectory() as folder:
        with _silent():
            tables = decodable(Path(folder))
        for name, table in tables.items():
            able = [compression for compression, result in table.items() if result == "yes"]
            if not able:
                why = next(iter(table.values()))
                yield Finding(name, f"reads nothing here: {why}", "note")
            else:
                unable = [compression for compression in table if compression not in able]
                yield Finding(name, f"decodes {', '.join(able)}" + (f"; not {', '.join(unable)}" if unable else ""))


def examine_disk(folder: Path, megabytes: int = 128) -> Iterator[Finding]:
    """Free space, and how fast a file is written and read back (not from memory, where the system lets one say so)."""
    usage = shutil.disk_usage(folder)
    full = usage.free < 10 * _GB
    yield Finding(
        f"disk of {folder}",
        f"{usage.free / _GB:.0f} GB free" + ("; indexes, features and reports may not fit" if full else ""),
        "note" if full else "ok",
    )
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = megabytes / (time.perf_counter() - start)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            while file.read(1 << 20):
                pass
            read = megabytes / (time.perf_counter() - start)
    except OSError as error:
        yield Finding(
            "disk speed", f"{folder} cannot be written ({error.strerror}); give --disk a folder that can", "wrong"
        )
        return
    slow = read < 100
    yield Finding(
        "disk speed",
        f"writes {written:.0f} MB/s, reads {read:.0f} MB/s"
        + ("; slides on such a disk are better copied ahead: --slide_cache on a local disk" if slow else ""),
        "note" if slow else "ok",
    )


def examine_slide(path: Path, mpp: float = 0.5, tile_size: int = 224) -> Iterator[Finding]:
    """Resolution, levels, compression of a slide; what will be done with it, and what is wrong."""
    from cytossl_monai.data.slides.open import open_slide

    try:
        slide = open_slide(path)
    except SlideError as error:
        yield Finding("slide", str(error), "wrong")
        if "mpp" not in str(error) or not path.exists():
            return
        try:
            slide = open_slide(path, mpp=0.25)
        except SlideError:
            return
        yield Finding("slide", "what follows takes 0.25 um/px, which may be wrong", "note")
    with slide:
        yield Finding("slide", f"{path}, {path.stat().st_size / _GB:.2f} GB, read by {slide.backend}")
        yield Finding(
            "resolution",
            f"{slide.width:,} x {slide.height:,} px at {slide.mpp:.4g} um/px (from the {slide.mpp_source})",
        )
        levels = ", ".join(f"{w} x {h} (1:{d:g})" for (w, h), d in zip(slide.level_dimensions, slide.level_downsamples))
        flat = len(slide.level_dimensions) == 1 and slide.width * slide.height > 1 << 26
        yield Finding(
            "levels",
            levels + ("; one level only: low power is slow, cytossl convert makes a pyramid" if flat else ""),
            "note" if flat else "ok",
        )
        yield Finding("compression", _compression(path))
        level = slide.best_level(mpp)
        coarse = slide.mpp > 1.1 * mpp
        scale = mpp / slide.mpp / slide.level_downsamples[level]
        how = (
            "as it is"
            if abs(scale - 1) * tile_size < 0.25
            else f"{'averaged' if scale > 1 else 'enlarged'} {scale:.3g}"
        )
        side = tile_size * mpp / slide.mpp
        columns, rows = int(slide.width // side), int(slide.height // side)
        yield Finding(
            "tiles",
            f"of {tile_size} px at {mpp:g} um/px: from level {level}, {how}; "
            f"{columns * rows:,} on the whole slide"
            + ("; the scan is coarser than the tiles: give a larger --mpp" if coarse else ""),
            "note" if coarse else "ok",
        )
        start = time.perf_counter()
        middle = np.array([(slide.width // 2, slide.height // 2)] * 1)
        for _ in range(20):
            slide.read_regions(middle, min(tile_size, slide.width, slide.height), mpp)
        yield Finding(
            "reading", f"{20 / (time.perf_counter() - start):.0f} tiles a second, one thread, from its middle"
        )
        glass = slide.glass
        dark = int(glass.max()) < 150
        yield Finding(
            "glass",
            f"RGB {', '.join(str(v) for v in glass.tolist())}"
            + ("; darker than glass is: a fluorescence scan, or a slide without any glass?" if dark else ""),
            "note" if dark else "ok",
        )


def _compression(path: Path) -> str:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            page = tif.pages[0]
            layout = f"tiles of {page.tilewidth} x {page.tilelength}" if page.is_tiled else "strips"  # type: ignore[union-attr]
            return f"{page.compression.name}, {layout}"  # type: ignore[union-attr]
    except (tifffile.TiffFileError, OSError, AttributeError, IndexError):
        return "the format's own (no TIFF)"


def doctor(arguments: Sequence[str]) -> int:
    """Examine this machine and slides; print what is found.

    Args:
        arguments: paths of slides; ``--disk DIR`` for the folder whose disk is measured (the working directory).

    Returns:
        0 when nothing is wrong, else 1.

    Raises:
        InputError: for an unknown option.
    """
    words, folder, slides = list(arguments), Path.cwd(), []
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            print(
                "cytossl doctor [SLIDE ...] [--disk DIR]\n\nSays what this machine can do, what is wrong with it, and"
            )
            print("what will be done with the slides. DIR: whose disk is measured (default: this folder).")
            return 0
        if word == "--disk" and words:
            folder = Path(words.pop(0))
            if not folder.is_dir():
                raise InputError(f"{folder} is no folder; give --disk the folder of your slides or results")
        elif word.startswith("-"):
            raise InputError(f"cytossl doctor has no option {word}; it takes slides and --disk DIR")
        else:
            slides.append(Path(word))
    wrong = 0
    sections = [examine_machine(), examine_readers(), examine_disk(folder), *(examine_slide(slide) for slide in slides)]
    for section in sections:
        for finding in section:
            wrong += finding.state == "wrong"
            print(f"{_MARKS[finding.state]} {finding.subject:<14} {finding.says}", flush=True)
    print(f"\n{wrong} thing{'s' if wrong != 1 else ''} wrong" if wrong else "\nnothing is wrong")
    return 1 if wrong else 0
