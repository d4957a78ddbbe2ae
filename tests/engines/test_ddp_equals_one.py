"""Two processes that share a batch train what one process trains on the whole of it; DDP for all, FSDP as a switch.

The pair of processes is started once, as torchrun starts it, and does everything that is asked of it here.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_methods import small_method
from ssl_standins import SIZE, dark_spots, make_trainer
from tiny_encoders import small_vit
from torch import nn

from cytossl_monai.engines.ssl.checkpoint import read_checkpoint
from cytossl_monai.engines.ssl.sharding import is_sharded
from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.handlers.checkpoint import CheckpointHandler
from cytossl_monai.handlers.export import EncoderExport
from cytossl_monai.metrics.logged import scalars
from cytossl_monai.networks.files import load_encoder
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.transforms.ncp.batched import BatchedNCP
from cytossl_monai.transforms.views.generator import ViewGenerator
from cytossl_monai.utils import distributed
from cytossl_monai.utils.seeding import seed_all

STEPS, BATCH = 20, 16
METHODS = ("moco_v3", "simclr", "byol", "dino", "ibot", "mae")


def build(name: str) -> nn.Module:
    """In float64: what differs is then the mathematics, not rounding that AdamW has blown up over 20 steps."""
    seed_all(3)
    network = small_vit(
        img_size=24, patch_size=6, hidden_size=16, num_heads=2, qkv_bias=True,
        rpe="product", sparsity="routed", num_salient=3, window=1,
    )  # fmt: skip
    return small_method(name, Encoder(network)).double()


class Keep:
    """The losses of a run."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def attach(self, engine: SSLTrainer) -> None:
        from ignite.engine import Events

        # The joined loss is the mean of the processes'.
        engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e: self.losses.append(scalars(e.state.output)["loss"])
        )


def trainer_of(name: str, batch: int, handlers: tuple = (), **options: Any) -> SSLTrainer:
    views = ViewGenerator(
        global_size=24,
        local_size=12,
        n_global=1 if name == "mae" else 2,
        n_local=2 if name in ("dino", "ibot") else 0,
        ncp=BatchedNCP("strong", patch_um=4.0),
        ncp_views="all" if name == "mae" else (1,),
        segmenter=dark_spots,
    )
    settings = {"steps": STEPS, "view_group": BATCH // 2, "lr": 1e-3, "clip_norm": 1.0, **options}
    return make_trainer(None, batch=batch, method=build(name), views=views, handlers=handlers, **settings)


def losses_of(name: str, batch: int, **options: Any) -> list[float]:
    keep = Keep()
    trainer_of(name, batch, (keep,), **options).run()
    return keep.losses


def resumed_run(folder: Path, batch: int, strategy: str) -> list[float]:
    """Half of a run with a checkpoint, the other half resumed from it, exported at the end."""
    losses: list[float] = []
    for steps in (4, 8):
        keep = Keep()
        handlers = (keep, CheckpointHandler(folder, 0, every_steps=4), EncoderExport(folder / "model.pt"))
        trainer = trainer_of("moco_v3", batch, handlers, steps=steps, strategy=strategy, checkpoint_dir=folder)
        assert is_sharded(trainer.method) == (strategy == "fsdp")
        trainer.run()
        losses += keep.losses
    return losses


def in_each_process(folder: Path) -> None:
    distributed.init_distributed("gloo")
    found: dict[str, Any] = {name: losses_of(name, BATCH // 2) for name in METHODS}
    found["fsdp"] = resumed_run(folder / "fsdp", BATCH // 2, "fsdp")
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.shutdown_distributed()


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(pair_folder: Path) -> list[dict[str, Any]]:
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
        command = [sys.executable, __file__, str(pair_folder)]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            _, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()  # where one failed, the other waits for it
    return [json.loads((pair_folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(name: str, pair: list[dict[str, Any]]) -> None:
    assert SIZE == 24
    whole = losses_of(name, BATCH)
    joined = [(a + b) / 2 for a, b in zip(*(process[name] for process in pair))]
    assert len(joined) == STEPS
    assert joined == pytest.approx(whole, abs=1e-6)
    assert max(whole) - min(whole) > 1e-2, "the run stood still: nothing was compared"


def test_fsdp_equals_one_process_and_resumes(pair: list[dict[str, Any]], tmp_path: Path) -> None:
    joined = [(a + b) / 2 for a, b in zip(*(process["fsdp"] for process in pair))]
    assert len(joined) == 8
    assert joined == pytest.approx(resumed_run(tmp_path, BATCH, "ddp"), abs=1e-6)


def test_what_fsdp_writes_is_read_by_one_process(pair: list[dict[str, Any]], pair_folder: Path) -> None:
    encoder, meta = load_encoder(pair_folder / "fsdp" / "model.pt")
    assert (meta["method"], meta["steps"]) == ("MoCoV3", 8)
    content = read_checkpoint(pair_folder / "fsdp" / "step_00000008.pt")
    weights = {k.removeprefix("student."): v for k, v in content["model"].items() if k.startswith("student.")}
    assert all(torch.equal(value, weights[name].to(value.dtype)) for name, value in encoder.state_dict().items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_each_process(Path(sys.argv[1]))
