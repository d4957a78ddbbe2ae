"""Run a command as a user does and measure it: wall time, CPU time and the memory of all its processes."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Measured:
    """Wall and CPU seconds of a command, children included, and its peak memory in GB."""

    seconds: float
    cpu: float
    memory: float


def measured_run(command: list[str]) -> Measured:
    """Run a command to its end; a failure ends this program with what the command said."""
    before, start = os.times(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    peak, stop = [0.0], threading.Event()
    watcher = threading.Thread(target=_watch_memory, args=(process.pid, peak, stop))
    watcher.start()
    output, _ = process.communicate()
    stop.set()
    watcher.join()
    seconds, after = time.perf_counter() - start, os.times()
    if process.returncode:
        raise SystemExit(output.decode())
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(seconds, cpu, peak[0])


def _watch_memory(pid: int, peak: list[float], stop: threading.Event) -> None:
    """Keep the largest sum of memory over a process and its children (shared pages counted once, as PSS)."""
    root = psutil.Process(pid)
    while not stop.wait(0.2):
        try:
            family = [root, *root.children(recursive=True)]
            total = sum(member.memory_full_info().pss for member in family) / 1e9
        except psutil.Error:
            continue
        peak[0] = max(peak[0], total)
