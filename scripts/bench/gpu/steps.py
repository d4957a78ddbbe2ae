"""Training steps of each method, with and without ``torch.compile``: images a second, memory, use of the device.

Use is the arithmetic of forward and backward, counted by PyTorch, over what a large matrix product does in that time.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from common import arguments, autocast, device_of, figure, seconds_of, synchronise
from torch.utils.flop_counter import FlopCounterMode

from cytossl_monai.engines import build_optimizer
from cytossl_monai.methods import BYOL, DINO, IBOT, MAE, MoCoV3, SimCLR
from cytossl_monai.networks import Encoder, sr_vit_small, sr_vit_tiny

METHODS = {"simclr": SimCLR, "moco_v3": MoCoV3, "byol": BYOL, "dino": DINO, "ibot": IBOT, "mae": MAE}

HEAD = {"hidden_dim": 32}
SMALL: dict[str, dict[str, Any]] = {
    "simclr": {"dim": 8, **HEAD},
    "moco_v3": {"dim": 8, **HEAD},
    "byol": {"dim": 8, **HEAD},
    "dino": {"out_dim": 64, "bottleneck_dim": 16, **HEAD},
    "ibot": {"out_dim": 64, "patch_out_dim": 64, "bottleneck_dim": 16, **HEAD},
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
}
"""Heads of a dry run."""


def matrix_flops(device: torch.device, size: int) -> float:
    """Operations a second of a bf16 matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, repeats=5, warmup=2)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seconds", type=float, default=60.0, help="after so long no further method is compiled")
    args = parser.parse_args()
    begin = time.perf_counter()
    device = device_of(args.dry)
    batch, size, repeats = (4, 32, 1) if args.dry else (128, 224, 5)
    peak = matrix_flops(device, 256 if args.dry else 8192)
    figure("bf16 matrix product, TFLOP/s", peak / 1e12)
    failed = []
    # The compiler takes long: all methods as they are come first.
    for compiled in (False, True):
        for name in args.methods:
            if compiled and not args.dry and time.perf_counter() - begin > args.seconds:
                print(f"{name} is not compiled: {args.seconds:g} s are over", flush=True)
                continue
            make = METHODS[name]
            torch.manual_seed(0)
            torch._dynamo.reset()
            network = sr_vit_tiny(img_size=32, num_layers=1, num_keys=2) if args.dry else sr_vit_small()
            method = make(Encoder(network), **(SMALL[name] if args.dry else {})).to(device).train()
            optimizer = build_optimizer(method, "adamw", lr=1e-4)
            call = torch.compile(method, backend="eager" if args.dry else "inductor") if compiled else method
            views = {
                "global": [torch.rand(batch, 3, size, size, device=device) for _ in range(1 if name == "mae" else 2)]
            }

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)  # noqa: B023
                with autocast(device):
                    loss = call(views)["loss"]  # noqa: B023 - called within this turn
                loss.backward()
                optimizer.step()  # noqa: B023
                method.update(0.1)  # noqa: B023

            label = f"{name}{', compiled' if compiled else ''}"
            try:
                flops = 0
                if not compiled:
                    with FlopCounterMode(display=False) as counter:
                        step()
                    flops = counter.get_total_flops()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds = seconds_of(step, device, repeats, warmup=1 if args.dry else 3)
                synchronise(device)
            except RuntimeError as error:
                failed.append(label)
                print(f"{label} failed: {str(error).splitlines()[0]}", flush=True)
                continue
            figure(f"{label}, images/s", batch / seconds)
            if device.type == "cuda":
                figure(f"{label}, GB", torch.cuda.max_memory_allocated() / 1e9)
            if flops:
                figure(f"{label}, use of the device", flops / seconds / peak)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
