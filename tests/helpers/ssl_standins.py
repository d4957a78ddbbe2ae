"""A small SSL run that tests can start in this process or another: stand-in images and encoder, the real rest."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Events
from tiny_encoders import TinyEncoder
from torch import Tensor, nn

from cytossl_monai.data.tiles.loader import tile_loader
from cytossl_monai.data.tiles.sampler import SSLBatchSampler
from cytossl_monai.engines.ssl.optim import build_optimizer
from cytossl_monai.engines.ssl.schedules import WarmupCosine
from cytossl_monai.engines.ssl.trainer import SSLTrainer
from cytossl_monai.engines.ssl.wrap import prepare
from cytossl_monai.handlers.checkpoint import CheckpointHandler
from cytossl_monai.handlers.csv_log import CSVLog
from cytossl_monai.handlers.signals import PreemptionHandler
from cytossl_monai.methods.moco_v3 import MoCoV3
from cytossl_monai.transforms.views.generator import ViewGenerator
from cytossl_monai.utils import distributed
from cytossl_monai.utils.program import plain_errors
from cytossl_monai.utils.seeding import seed_all

SIZE = 24


class Dots:
    """Images that are a function of their number: a coloured disc on a light ground. Four groups of unequal size."""

    def __init__(self, n: int = 60) -> None:
        self.groups = np.minimum(np.arange(n) * 8 // n, 3)
        self.weights = None

    def __len__(self) -> int:
        return len(self.groups)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[dict]:
        items = []
        for number, sample in keys:
            rng = np.random.default_rng(number)
            yy, xx = np.mgrid[:SIZE, :SIZE]
            inside = np.hypot(yy - rng.uniform(6, 18), xx - rng.uniform(6, 18)) < rng.uniform(3, 7)
            image = np.where(inside, rng.integers(30, 160, (3, 1, 1)), 235) + rng.integers(-9, 9, (3, SIZE, SIZE))
            items.append({"image": torch.from_numpy(image.astype(np.uint8)), "mpp": np.float32(0.5), "sample": sample})
        return items


def dark_spots(tiles: Tensor, mpp: object) -> Tensor:
    """Nuclei of ``Dots``: dark pixels."""
    del mpp
    return tiles.float().mean(1, keepdim=True) < 180


def make_trainer(
    output: str | Path | None,
    steps: int = 12,
    workers: int = 0,
    batch: int = 8,
    every_steps: int = 4,
    method: nn.Module | None = None,
    handlers: tuple = (),
    lr: float = 1e-3,
    dropout: float = 0.1,
    epoch_length: int = 5,
    strategy: str = "ddp",
    **options: object,
) -> SSLTrainer:
    """A trainer over ``Dots``; ``output`` None writes nothing."""
    seed_all(3)
    method = method or MoCoV3(TinyEncoder(dropout), dim=8, hidden_dim=32)
    network = prepare(method, "cpu", strategy)
    data = Dots()
    sampler = SSLBatchSampler(
        data,
        batch,
        seed=5,
        epoch_length=epoch_length,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        window=3,
        chunk=4,
    )
    own: list = []
    if output is not None:
        checkpoint = CheckpointHandler(Path(output) / "checkpoints", 0, every_steps, keep_last=3)
        own = [CSVLog(Path(output) / "log.csv", 1), checkpoint, PreemptionHandler(checkpoint, every_steps=2)]
        options.setdefault("checkpoint_dir", Path(output) / "checkpoints")
    options.setdefault("views", ViewGenerator(global_size=18, n_local=0, find_nuclei=False))
    return SSLTrainer(
        "cpu",
        max_epochs=1,
        train_data_loader=tile_loader(data, sampler, num_workers=workers),
        network=network,
        optimizer=build_optimizer(network, lr=lr),
        max_steps=steps,
        lr_schedule=WarmupCosine(lr, warmup_steps=3),
        wd_schedule=WarmupCosine(0.04, 0.4),
        train_handlers=[*own, *handlers],
        seed=11,
        **options,  # type: ignore[arg-type]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kill-at", type=int, default=0, help="SIGKILL to itself within this step")
    parser.add_argument("--tell", action="store_true", help="print every step, slowly")
    parser.add_argument("--group", action="store_true", help="join the processes that torchrun started")
    args = parser.parse_args()
    plain_errors()
    if args.group:
        distributed.init_distributed("gloo")
    trainer = make_trainer(args.output, args.steps, args.workers)
    if args.kill_at:

        @trainer.on(Events.ITERATION_STARTED)
        def kill(engine: SSLTrainer) -> None:
            if engine.state.iteration == args.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if args.tell:
        import time

        @trainer.on(Events.ITERATION_COMPLETED)
        def tell(engine: SSLTrainer) -> None:
            print(f"{engine.state.iteration}\n", end="", flush=True)  # in one piece: two processes may tell at once
            time.sleep(0.1)

    trainer.run()
    distributed.shutdown_distributed()


if __name__ == "__main__":
    main()
