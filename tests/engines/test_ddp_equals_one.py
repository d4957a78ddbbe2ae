"""Two processes that share a batch train what one process trains on the whole of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ssl_standins import SIZE, TinyEncoder, make_trainer
from torch import nn

from cytossl_monai.engines import distributed
from cytossl_monai.engines.ssl_trainer import SSLTrainer, scalars, seed_all
from cytossl_monai.methods.byol import BYOL
from cytossl_monai.methods.dino import DINO
from cytossl_monai.methods.moco_v3 import MoCoV3
from cytossl_monai.methods.simclr import SimCLR
from cytossl_monai.transforms.perturbation import BatchedNCP
from cytossl_monai.transforms.views import ViewGenerator

STEPS, BATCH = 20, 16


def build(name: str) -> nn.Module:
    seed_all(3)
    encoder = TinyEncoder(dropout=0.0)
    if name == "moco_v3":
        return MoCoV3(encoder, dim=8, hidden_dim=32)
    if name == "simclr":
        return SimCLR(encoder, dim=8, hidden_dim=32)
    if name == "byol":
        return BYOL(encoder, dim=8, hidden_dim=32)
    if name == "dino":
        return DINO(encoder, out_dim=32, hidden_dim=32, bottleneck_dim=16)
    raise ValueError(name)


def dark_spots(tiles, mpp):
    """Nuclei of the stand-in images: dark pixels."""
    del mpp
    return tiles.float().mean(1, keepdim=True) < 180


def losses_of(name: str, batch: int) -> list[float]:
    from ignite.engine import Events

    losses: list[float] = []
    views = ViewGenerator(
        global_size=18,
        local_size=12,
        n_local=2 if name == "dino" else 0,
        ncp=BatchedNCP("strong", patch_um=4.0),
        segmenter=dark_spots,
    )

    class Keep:
        def attach(self, engine: SSLTrainer) -> None:
            # The joined loss is the mean of the processes'.
            engine.add_event_handler(
                Events.ITERATION_COMPLETED, lambda e: losses.append(scalars(e.state.output)["loss"])
            )

    make_trainer(
        None,
        steps=STEPS,
        batch=batch,
        method=build(name),
        views=views,
        view_group=BATCH // 2,
        handlers=(Keep(),),
        lr=1e-3,
        clip_norm=1.0,
    ).run()
    return losses


@pytest.mark.parametrize("name", ["moco_v3", "simclr", "byol", "dino"])
def test_two_processes_equal_one(name: str, tmp_path: Path) -> None:
    assert SIZE > 18
    whole = losses_of(name, BATCH)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(2):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        command = [sys.executable, __file__, name, str(tmp_path / f"{rank}.json")]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    halves = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    joined = [(a + b) / 2 for a, b in zip(*halves)]
    assert len(joined) == STEPS
    assert joined == pytest.approx(whole, abs=1e-4)
    assert max(whole) - min(whole) > 1e-2, "the run stood still: nothing was compared"


if __name__ == "__main__":
    distributed.init_distributed("gloo")
    found = losses_of(sys.argv[1], BATCH // 2)
    Path(sys.argv[2]).write_text(json.dumps(found))
    distributed.shutdown_distributed()
