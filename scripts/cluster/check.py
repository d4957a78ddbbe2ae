"""Parts of check.sh: what it computes on, the disturbance, and the comparison."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def make(folder: Path) -> None:
    """Eight small slides, one of them broken; an encoder and a classifier that were not trained: equality is tested."""
    import torch

    from cytossl_monai.data import make_slides, read_slide_table, write_slide_table
    from cytossl_monai.networks.files import save_classifier, save_encoder
    from cytossl_monai.networks.mil.abmil import ABMIL
    from cytossl_monai.networks.mil.classifier import MILClassifier
    from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
    from cytossl_monai.networks.nets.sr_transformer import sr_vit_tiny

    table = make_slides(folder / "slides", 8, 1024, seed=3, density=900.0, blur=0.0, progress=False, num_workers=2)
    records = read_slide_table(table)
    records[-1].path.write_bytes(b"not a slide")
    write_slide_table(table, records)
    torch.manual_seed(0)
    network = sr_vit_tiny(hidden_size=96, mlp_dim=192, num_layers=4, num_heads=3, img_size=96, num_salient=4)
    encoder = Encoder(network, pool="mean").eval()
    save_encoder(folder / "model.pt", encoder, {"name": "check"})
    mil = ABMIL(encoder.embed_dim, 2, embed_dim=8, attention_dim=8)
    known = {"hash": encoder_hash(encoder), "name": "check", "dim": encoder.embed_dim}
    save_classifier(folder / "classifier.pt", MILClassifier(mil, ("negative", "positive"), encoder=known).eval())


def jobs() -> dict[str, tuple[str, str]]:
    """SLURM job id -> (state, comment); the engine's comment names rule and chunk."""
    lines = subprocess.run(["squeue", "-h", "-t", "all", "-o", "%i|%T|%k"], capture_output=True, text=True).stdout
    return {i: (state, comment) for i, state, comment in (line.split("|", 2) for line in lines.splitlines())}


def descendants(pid: int) -> list[int]:
    """Processes below one, deepest last."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    below = list(children.get(pid, []))
    for one in below:
        below.extend(children.get(one, []))
    return below


def bundle_process(job: str) -> int | None:
    """The process that computes in a job: the deepest whose command is a bundle's."""
    listed = subprocess.run(["scontrol", "listpids", job], capture_output=True, text=True).stdout.splitlines()[1:]
    for pid in {int(line.split()[0]) for line in listed if line.split()[0].isdigit()}:
        for below in reversed([pid, *descendants(pid)]):
            try:
                command = Path(f"/proc/{below}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"monai.bundle" in command:
                return below
    return None


def disturb(folder: Path, workflow: int) -> None:
    """Watch the workflow: count jobs side by side, cancel one that indexes, kill the process of one that embeds."""
    side_by_side, cancelled, killed = 0, "", ""
    start = time.monotonic()
    while Path(f"/proc/{workflow}").exists() and Path(f"/proc/{workflow}/stat").read_text().split(")")[1][1] != "Z":
        now = jobs()
        running = {job: comment for job, (state, comment) in now.items() if state == "RUNNING"}
        side_by_side = max(side_by_side, len(running))
        for job, comment in running.items():
            if not cancelled and "index" in comment and len(running) >= 4:
                subprocess.run(["scancel", job], check=True)
                cancelled = comment
            elif not killed and "embed" in comment:
                pid = bundle_process(job)
                # In the midst: its slides have begun, which is when it has taken the lock of one.
                if pid is not None and any((folder / "cluster" / "features").glob("*.h5")):
                    os.kill(pid, signal.SIGKILL)
                    killed = f"{comment} (process {pid})"
        time.sleep(0.3)
    print(
        f"   {side_by_side} jobs side by side; cancelled {cancelled}; killed {killed}; {time.monotonic() - start:.0f} s"
    )
    if side_by_side < 4 or not cancelled or not killed:
        raise SystemExit("check.py: the workflow was over before four jobs ran, one was cancelled and one was killed")


def compare(alone: Path, cluster: Path, table: Path) -> None:
    """Every index, feature, prediction and report line of two runs is equal."""
    import numpy as np
    import pandas as pd

    from cytossl_monai.data import TileIndex, read_features, read_slide_table

    equal = 0
    for record in read_slide_table(table):
        name = f"{record.slide_id}.parquet"
        if not (alone / "index" / name).exists():
            assert not (cluster / "index" / name).exists(), record.slide_id
            continue
        first, second = (TileIndex.read(folder / "index" / name).table for folder in (alone, cluster))
        pd.testing.assert_frame_equal(first, second)
        first, second = (read_features(folder / "features" / f"{record.slide_id}.h5") for folder in (alone, cluster))
        assert np.array_equal(first.features, second.features), record.slide_id
        assert np.array_equal(first.coords, second.coords), record.slide_id
        assert first.encoder == second.encoder
        tiles = (pd.read_parquet(folder / "reports" / record.slide_id / "tiles.parquet") for folder in (alone, cluster))
        pd.testing.assert_frame_equal(*tiles)
        equal += 1
    assert equal, "nothing to compare"
    first, second = (pd.read_csv(folder / "reports" / "predictions.csv") for folder in (alone, cluster))
    pd.testing.assert_frame_equal(first, second)
    for step in ("index", "features", "reports"):
        columns = ["item", "status"]
        first, second = (pd.read_csv(folder / step / "report.csv")[columns] for folder in (alone, cluster))
        assert first["item"].tolist() == second["item"].tolist(), step
        # What a killed job had finished is "current" for the one that went on.
        same = (first["status"].replace("current", "done") == second["status"].replace("current", "done")).all()
        assert same, f"{step}: {first} {second}"
    left = [p for folder in ("index", "features") for p in (cluster / folder).glob(".*.partial*")]
    print(f"   {equal} slides: index, features, tiles, predictions and reports are equal; {len(left)} half files left")


if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    if step == "make":
        make(Path(arguments[0]))
    elif step == "disturb":
        disturb(Path(arguments[0]), int(arguments[1]))
    else:
        compare(*map(Path, arguments))
