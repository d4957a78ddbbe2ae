"""The campaign: malformed inputs, each in a process of its own, and runs that are killed; its counts as a table.

python tests/robustness/campaign.py --cases 200 --kills 20 --out docs/benchmarks/robustness.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from kills import KILLED, run_kills
from malformed import CLASSES, Whole

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
        "| killed step | runs | equal after the next run | equal, something unfinished left | differs | had ended |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for step, counts in kills.items():
        figures = " | ".join(str(counts[o]) for o in KILLED)
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
