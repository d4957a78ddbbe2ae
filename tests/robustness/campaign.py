"""The campaign: malformed inputs, each in a process of its own, and runs that are killed; its counts as a table.

python tests/robustness/campaign.py --cases 200 --kills 20 --out docs/benchmarks/robustness.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))

from malformed import CLASSES, Whole

from cytossl_monai.data.synthetic.slides import make_slides
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.utils.errors import InputError

LIMIT = 60
"""Seconds that a case may take."""

OUTCOMES = ("read", "sentence", "wrong", "traceback", "died", "slow", "escaped")
"""Read as it is; refused in one sentence; other pixels than the original's; another error; the process gone; too long;
something run or written outside."""


def run_case(whole: Whole, name: str, seed: int, folder: Path) -> tuple[str, str]:
    """One case: its outcome and what was said."""
    suffix, make, use = CLASSES[name]
    rng = np.random.default_rng([seed, list(CLASSES).index(name)])
    path = make(whole, folder / f"case{suffix}", rng)
    before = sorted(p.name for p in folder.iterdir())
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)

    def child() -> None:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        try:
            text = use(path)
            theirs.send(("wrong" if text.startswith("wrong") else "read", text))
        except InputError as error:
            text = str(error)
            plain = "\n" not in text and len(text) < 600 + 2 * len(str(path)) and path.name in text
            theirs.send(("sentence" if plain else "traceback", text))
        except BaseException as error:  # noqa: BLE001 - every other error is what the campaign looks for
            theirs.send(("traceback", f"{type(error).__name__}: {error}"))
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(LIMIT) else ("slow", "")
    except EOFError:
        answer = ("died", "")
    process.kill()
    process.join()
    after = sorted(p.name for p in folder.iterdir())
    path.unlink()
    return answer if after == before else ("escaped", str(set(after) - set(before)))


def run_malformed(cases: int, seed: int = 0, names: list[str] | None = None) -> dict[str, Counter[str]]:
    """Every class, ``cases`` times; prints what went wrong."""
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        whole = Whole(Path(scratch))
        for name in names or CLASSES:
            counts[name] = Counter()
            for number in range(cases):
                outcome, text = run_case(whole, name, seed + number, whole.folder)
                counts[name][outcome] += 1
                if outcome not in ("read", "sentence"):
                    print(f"{name} {seed + number}: {outcome}: {text[:300]}", flush=True)
    return counts


INDEX = (
    "import sys; from cytossl_monai.index.build import SlideIndexer\n"
    "sys.exit(SlideIndexer(sys.argv[1], sys.argv[2], num_workers=1, progress=False).run().exit_code)"
)
EMBED = (
    "import sys; from cytossl_monai.inference.embed import embed_slides\n"
    "from cytossl_monai.data.slide_table import read_slide_table\n"
    "from cytossl_monai.networks.files import load_encoder\n"
    "encoder, _ = load_encoder(sys.argv[4])\n"
    "report = embed_slides(read_slide_table(sys.argv[1]), sys.argv[3], sys.argv[2], encoder, progress=False)\n"
    "sys.exit(report.exit_code)"
)


def start(code: str, *arguments: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)


def contents(folder: Path) -> dict[str, object]:
    """What a finished run has made, without times of day."""
    found: dict[str, object] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet":
            index = TileIndex.read(path)
            found[path.name] = (index.table.to_csv(), str({k: v for k, v in index.meta.items() if k != "slide_mtime"}))
        elif path.suffix == ".h5":
            import h5py

            with h5py.File(path) as file:
                found[path.name] = (file["features"][()].tobytes(), file["coords"][()].tobytes())
        elif path.suffix == ".csv":
            found[path.name] = sorted(pd.read_csv(path)["item"])
        elif not path.name.startswith("."):
            found[path.name] = path.stat().st_size
    return found


def run_kills(kills: int, seed: int = 0) -> dict[str, Counter[str]]:
    """Index and embed killed at random moments, then run again: equal to a run that nobody killed?"""
    counts: dict[str, Counter[str]] = {"index": Counter(), "embed": Counter()}
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "inputs").mkdir()
        whole = Whole(root / "inputs")
        table = make_slides(root / "slides", 3, 1024, seed=3, blur=0, progress=False)
        for step, code in (("index", INDEX), ("embed", EMBED)):
            more = () if step == "index" else (root / "index", whole.encoder)
            begin = time.perf_counter()
            assert start(code, table, root / step, *more).wait(300) == 0
            length = time.perf_counter() - begin
            expected = contents(root / step)
            for number in range(kills):
                out = root / f"{step}{number}"
                process = start(code, table, out, *more)
                time.sleep(draw.uniform(0.3, 1.0) * length)
                how = draw.choice([signal.SIGKILL, signal.SIGTERM])
                if process.poll() is None:
                    os.killpg(process.pid, how)
                process.wait(60)
                again = start(code, table, out, *more).wait(300)
                same = again == 0 and contents(out) == expected
                left = [p.name for p in out.iterdir() if ".partial" in p.name]
                counts[step]["equal" if same and not left else "left over" if same else "differs"] += 1
    return counts


def page(malformed: dict[str, Counter[str]], kills: dict[str, Counter[str]], command: str) -> str:
    total: Counter[str] = sum(malformed.values(), Counter())
    lines = [
        "# Robustness",
        "",
        "Malformed inputs by class, from fixed seeds, each read in a process of its own, and runs that are killed at",
        "random moments. *Read*: what is sound of it was used. *Sentence*: refused with one that names the file.",
        "*Wrong*: pixels that differ from the original's passed for sound. *Traceback*, *died*, *slow* (over a minute)",
        "and *escaped* (something run, or written beside the case) must be 0.",
        "",
        f"    {command}",
        "",
        f"Measured with Python {platform.python_version()} on {platform.system()}, {os.cpu_count()} cores.",
        "",
        "| class | cases | " + " | ".join(OUTCOMES) + " |",
        "|---|" + "---:|" * (len(OUTCOMES) + 1),
    ]
    for name, counts in [*malformed.items(), ("**all**", total)]:
        lines.append(f"| {name} | {counts.total()} | " + " | ".join(str(counts[o]) for o in OUTCOMES) + " |")
    lines += [
        "",
        "| killed step | runs | equal after the next run | equal, a partial file left | differs |",
        "|---|---:|---:|---:|---:|",
    ]
    for step, counts in kills.items():
        figures = " | ".join(str(counts[o]) for o in ("equal", "left over", "differs"))
        lines.append(f"| {step} | {counts.total()} | {figures} |")
    lines += [
        "",
        "A damaged tile is told by its JPEG markers, its frame and libjpeg's warnings. Damage of a few bytes that",
        "leaves the Huffman code in step gives no warning: those are the tiles counted as *wrong*.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=50, help="of each class")
    parser.add_argument("--kills", type=int, default=10, help="of each step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="Markdown to write")
    arguments = parser.parse_args()
    malformed = run_malformed(arguments.cases, arguments.seed)
    kills = run_kills(arguments.kills, arguments.seed)
    command = f"python tests/robustness/campaign.py --cases {arguments.cases} --kills {arguments.kills}"
    text = page(malformed, kills, command)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
