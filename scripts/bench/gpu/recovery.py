"""A pretraining in float16 with its loss scaler: ended by SIGTERM it saves and says 75, started again it goes on.

FSDP needs two GPUs: where they are, two processes train for a few steps with ``distributed_strategy: fsdp``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import arguments, cells, figure
from PIL import Image

from cytossl_monai.metrics import read_log

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "bundles" / "cytossl_pretrain" / "configs"


def command(images: Path, output: Path, dry: bool, steps: int, *more: str) -> list[str]:
    """The bundle's own command on a folder of images."""
    files = [
        CONFIGS / "train.json",
        ROOT / "configs" / "ssl" / "simclr.yaml",
        ROOT / "configs" / "data" / "images.yaml",
    ]
    files += [CONFIGS / "multi_gpu_train.json"] if "torchrun" in more else []
    start = ["-m", "torch.distributed.run", "--nproc_per_node=2"] if "torchrun" in more else []
    settings = {
        "dataset_dir": images, "output_dir": output, "steps": steps, "batch_size": 4 if dry else 64,
        "image_size": 64, "log_every": 1, "checkpoint_steps": 5, "num_workers": 0,
        "precision": "fp32" if dry else "fp16", "views#global_size": 32, "views#n_local": 0,
    }  # fmt: skip
    overrides = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    network = "{'_target_': 'cytossl_monai.networks.sr_vit_tiny', 'img_size': 32, 'num_layers': 1, 'num_keys': 2}"
    overrides += ["--backbone", network] + [word for word in more if word != "torchrun"]
    names = "[" + ",".join(f"'{path}'" for path in files) + "]"
    return [sys.executable, *start, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", names, *overrides]


def main() -> int:
    args = arguments(__doc__).parse_args()
    steps = 40 if args.dry else 100
    with tempfile.TemporaryDirectory() as folder:
        images, output = Path(folder) / "images", Path(folder) / "out"
        images.mkdir()
        for number, tile in enumerate(cells(32 if args.dry else 256, 64)):
            Image.fromarray(tile.permute(1, 2, 0).numpy()).save(images / f"{number:04d}.png")
        run = command(images, output, args.dry, steps)
        process = subprocess.Popen(run, cwd=ROOT)
        deadline = time.monotonic() + 300
        while process.poll() is None and not list(output.glob("checkpoints/step_*.pt")):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        status = process.wait()
        reached = max((step for step, *_ in read_log(output / "log.csv")), default=0)
        figure("exit status after SIGTERM (75)", status)
        figure("step at SIGTERM", reached)
        again = subprocess.run(run, cwd=ROOT, check=False).returncode
        log = read_log(output / "log.csv")
        losses = {step: value for step, _, name, value in log if name == "loss"}
        finite = all(torch.isfinite(torch.tensor(value)) for value in losses.values())
        figure("exit status of the resumed run", again)
        figure("steps logged once each", len(losses))
        figure("last loss", losses.get(steps, float("nan")))
        wrong = status != 75 or again != 0 or not finite or max(losses, default=0) != steps or not 0 < reached < steps
        if torch.cuda.device_count() > 1 and not args.dry:
            two = command(images, Path(folder) / "two", False, 20, "torchrun", "--distributed_strategy", "fsdp")
            both = subprocess.run(two, cwd=ROOT, check=False, env={**os.environ}).returncode
            figure("exit status of two processes with FSDP", both)
            wrong = wrong or both != 0
        else:
            print("FSDP is left out: it needs two GPUs", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
