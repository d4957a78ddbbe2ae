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
    from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny

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


def embedding_process(features: Path) -> int | None:
    """A process that computes features into this folder: a bundle's own, not a shell that waits for it."""
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda entry: int(entry.name)):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "monai.bundle" in words and str(features) in words and any(word.endswith("embed.json") for word in words):
            return int(entry.name)
    return None


def disturb(folder: Path, workflow: int) -> None:
    """Watch the workflow: count jobs side by side, cancel one that indexes, kill the process of one that embeds."""
    side_by_side, cancelled, killed = 0, "", ""
    features, start = folder / "cluster" / "features", time.monotonic()
    while Path(f"/proc/{workflow}").exists() and Path(f"/proc/{workflow}/stat").read_text().split(")")[1][1] != "Z":
        running = {job: comment for job, (state, comment) in jobs().items() if state == "RUNNING"}
        side_by_side = max(side_by_side, len(running))
        for job, comment in running.items():
            if not cancelled and "index" in comment and len(running) >= 4:
                subprocess.run(["scancel", job], check=True)
                cancelled = comment
        until = time.monotonic() + 0.5
        while not killed and time.monotonic() < until and any("embed" in comment for comment in running.values()):
            # In the midst: one is at a slide, whose lock it holds. These slides are done within a second.
            if any((features / ".locks").glob("*")) and (pid := embedding_process(features)) is not None:
                os.kill(pid, signal.SIGKILL)
                killed = f"process {pid} of an embedding"
            time.sleep(0.02)
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


def losses(one: Path, two: Path) -> None:
    """The losses of every step, and the encoder at the end, of two training runs are equal."""
    import torch

    from cytossl_monai.metrics.logged import read_log

    first, second = (
        [(step, value) for step, _, figure, value in read_log(folder / "log.csv") if figure == "loss"]
        for folder in (one, two)
    )
    assert first, f"no losses in {one / 'log.csv'}"
    assert first == second, f"{first} {second}"
    weights = [torch.load(folder / "models" / "model.pt", weights_only=True)["state_dict"] for folder in (one, two)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    print(f"   {len(first)} losses, {first[0][1]:.6f} to {first[-1][1]:.6f}, and the encoder are equal")


if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    if step == "make":
        make(Path(arguments[0]))
    elif step == "disturb":
        disturb(Path(arguments[0]), int(arguments[1]))
    elif step == "losses":
        losses(*map(Path, arguments))
    else:
        compare(*map(Path, arguments))
