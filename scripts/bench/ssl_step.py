"""How much a method's training step costs over the bare encoder.

The floor is a forward and backward pass of the same encoder on the same crops, and a forward pass of it for the
teacher where the method has one. The method's step is its forward and backward pass (heads and loss included) and its
``update`` (teacher, schedules). The optimiser is left out on both sides. Floor and step take turns, so that whatever
else the machine does hits both; the overhead is the median over turns of step / floor - 1.

    python scripts/bench/ssl_step.py --backbone vit_small --batch 16

With ``--shortcuts`` a third step takes its turn: the same one without the attention's shortcuts (no mask where every
patch sees every other; terms added inside the product on a CPU). The gain is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from cytossl_monai import networks
from cytossl_monai.methods import BYOL, DINO, IBOT, MAE, MoCoV3, SimCLR, SSLMethod
from cytossl_monai.networks.blocks.attention import dense
from cytossl_monai.networks.blocks.sparse_attention import SparseAttention

METHODS: dict[str, Callable[..., SSLMethod]] = {
    "simclr": SimCLR,
    "byol": BYOL,
    "moco_v3": MoCoV3,
    "dino": DINO,
    "ibot": IBOT,
    "mae": MAE,
}
LOCAL_CROPS = {"dino": 8, "ibot": 8}


def build_encoder(backbone: str, patch_size: int | None = None, size: int = 224) -> nn.Module:
    settings = {} if patch_size is None else {"patch_size": patch_size, "img_size": size}
    return networks.Encoder(getattr(networks, backbone)(**settings))


def without_shortcuts(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        plain = {"_sees_all": (SparseAttention, lambda *_: False), "_products_pay": (dense, lambda *_: False)}
        with contextlib.ExitStack() as stack:
            for name, (owner, value) in plain.items():
                stack.enter_context(mock.patch.object(owner, name, value))
            step()

    return run


def make_views(name: str, batch: int, size: int, device: torch.device) -> dict[str, list[Tensor]]:
    globals_ = 1 if name == "mae" else 2
    local = max(32, size * 96 // 224 // 16 * 16)
    return {
        "global": [torch.rand(batch, 3, size, size, device=device) for _ in range(globals_)],
        "local": [torch.rand(batch, 3, local, local, device=device) for _ in range(LOCAL_CROPS.get(name, 0))],
    }


def floor_step(method: SSLMethod, views: dict[str, list[Tensor]]) -> None:
    """Encoder forward and backward on the crops of the student, forward on those of the teacher."""
    student: Any = method.student
    if isinstance(method, MAE):
        images = torch.cat(views["global"])
        rows, columns = student.grid_size(*images.shape[-2:])
        kept = max(1, round(rows * columns * (1 - method.mask_ratio)))
        keep = torch.rand(len(images), rows * columns, device=images.device).topk(kept).indices.sort().values
        cls, patches = student.forward_tokens(images, keep=keep)
        (cls.float().square().mean() + patches.float().square().mean()).backward()
        return
    if hasattr(method, "teacher"):
        with torch.no_grad():
            SSLMethod.encode_jointly(method.teacher, views["global"])
    SSLMethod.encode_jointly(student, [*views["global"], *views["local"]]).float().square().mean().backward()


def method_step(method: SSLMethod, views: dict[str, list[Tensor]]) -> None:
    method(views)["loss"].backward()
    method.update(0.5)


def timed(step: Callable[[], None], method: SSLMethod, device: torch.device, clock: Callable[[], float]) -> float:
    method.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    device = torch.device(args.device)
    torch.manual_seed(0)
    method = METHODS[name](build_encoder(args.backbone, args.patch_size, args.size)).to(device).train()
    views = make_views(name, args.batch, args.size, device)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter

    def under_autocast(step: Callable[[SSLMethod, dict[str, list[Tensor]]], None]) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                step(method, views)

        return run

    floor, full = under_autocast(floor_step), under_autocast(method_step)
    for _ in range(args.warmup):
        timed(floor, method, device, clock)
        timed(full, method, device, clock)
    floors, steps, plain = [], [], []
    for _ in range(args.repeats):
        floors.append(timed(floor, method, device, clock))
        steps.append(timed(full, method, device, clock))
        plain.append(timed(without_shortcuts(full), method, device, clock) if args.shortcuts else steps[-1])
    return {
        "floor": args.batch / statistics.median(floors),
        "method": args.batch / statistics.median(steps),
        "overhead": statistics.median(s / f - 1 for s, f in zip(steps, floors, strict=True)),
        "gain": statistics.median(p / s for p, s in zip(plain, steps, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--backbone", default="vit_small", help="vit_small, sr_vit_tiny, sr_vit_small, resnet50, ...")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="side of a global crop; local crops are 3/7 of it")
    parser.add_argument("--patch-size", type=int, help="of a transformer; default: the backbone's, at 224 px")
    parser.add_argument("--shortcuts", action="store_true", help="measure what the attention's shortcuts gain")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: time of this process only")
    args = parser.parse_args()
    print(
        f"{args.backbone}, batch {args.batch}, {args.size} px, {args.device}, {args.precision}, "
        f"{torch.get_num_threads()} threads, {args.clock} clock, median of {args.repeats}"
    )
    print("| method | floor (images/s) | step (images/s) | overhead | gain of shortcuts |\n|---|---|---|---|---|")
    for name in args.methods:
        if name in ("ibot", "mae") and args.backbone.startswith("resnet"):
            continue
        row = measure(name, args)
        gain = f"{row['gain']:.3f}" if args.shortcuts else "-"
        cells = f"{row['floor']:.2f} | {row['method']:.2f} | {100 * row['overhead']:+.1f} % | {gain}"
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
