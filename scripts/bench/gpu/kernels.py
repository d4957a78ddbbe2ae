"""Attention in Triton kernels of our own, beside PyTorch's operations: whether it is right here, its time and memory.

A part of its own, since kernels that no GPU has run may end their process. Dry, and without Triton, only the other
paths are timed.

The goal of routed attention: with iRPE at 4,096 tokens it is faster than dense SDPA without.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch
from attention import bench
from common import arguments, autocast, device_of, figure, seconds_of
from torch import Tensor

from cytossl_monai.engines import build_optimizer
from cytossl_monai.methods import SimCLR
from cytossl_monai.networks import Encoder, sr_vit_small, sr_vit_tiny
from cytossl_monai.networks.blocks import sparse_attention

SWITCH = "CYTOSSL_TRITON_ATTENTION"


def watched(decision: str) -> list[bool]:
    """What a decision of `sparse_attention` says from now on, call by call."""
    pays = getattr(sparse_attention, decision)
    said: list[bool] = []

    def pays_and_says(*given: object) -> bool:
        said.append(pays(*given))
        return bool(said[-1])

    setattr(sparse_attention, decision, pays_and_says)
    return said


def attention(device: torch.device, dry: bool, ways: dict[str, str]) -> None:
    """Forward and backward of one layer, bf16, by each way in turn."""
    module, taken = bench(), watched("fused_pays")
    published = "ours: topk 16 + iRPE qkv (published)"
    dtype = torch.float32 if dry else torch.bfloat16
    for tokens in (16,) if dry else (196, 36):
        batch = max(1, (64 if dry else 32768) // tokens)
        layer, x = module._prepare(published, tokens, batch, str(device), dtype)
        plain, plain_x = module._prepare("dense SDPA, no iRPE", tokens, batch, str(device), dtype)
        times = {}
        for way, switch in ways.items():
            os.environ[SWITCH] = switch
            times[way] = seconds_of(lambda: module._step(layer, x), device, 1 if dry else 20)  # noqa: B023
            if way != "operations":
                figure(f"published attention: the kernels are taken at {tokens} tokens", any(taken[-1:]))
            figure(f"published attention by {way}, {tokens} tokens, ms for {batch} images", 1e3 * times[way])
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                module._step(layer, x)
                figure(f"published attention by {way}, {tokens} tokens, MiB", _mib(before))
        dense = seconds_of(lambda: module._step(plain, plain_x), device, 1 if dry else 20)  # noqa: B023
        figure(f"dense SDPA without iRPE, {tokens} tokens, ms for {batch} images", 1e3 * dense)
        if len(times) > 1:
            figure(f"kernels / operations at {tokens} tokens (below 1)", times["kernels"] / times["operations"])


def routed(device: torch.device, dry: bool, ways: dict[str, str]) -> None:
    """Routed attention, forward and backward of one layer, bf16; FlexAttention is timed by the part `attention`."""
    module, taken = bench(), watched("tiled_pays")
    dtype, repeats = (torch.float32, 1) if dry else (torch.bfloat16, 20)
    tokens = 64 if dry else 4096
    batch = 1 if dry else 32768 // tokens

    def timed(case: str) -> float:
        layer, x = module._prepare(case, tokens, batch, str(device), dtype)
        return 1e3 * seconds_of(lambda: module._step(layer, x), device, repeats)

    dense = timed("dense SDPA, no iRPE")
    figure(f"dense SDPA without iRPE, {tokens} tokens, ms for {batch} images", dense)
    way, switch = list(ways.items())[-1]
    os.environ[SWITCH] = switch
    for case in ("ours: routed + iRPE", "ours: routed, no iRPE"):
        milliseconds = timed(case)
        if way != "operations":
            figure(f"{case}: the kernels are taken at {tokens} tokens", any(taken[-1:]))
        figure(f"{case} by {way}, {tokens} tokens, ms for {batch} images", milliseconds)
        figure(f"{case} by {way} / dense SDPA without iRPE at {tokens} tokens (goal: below 1)", milliseconds / dense)


def _mib(before: int) -> float:
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def step(device: torch.device, dry: bool, ways: dict[str, str]) -> None:
    """A step of SimCLR with the published network."""
    batch, size = (4, 32) if dry else (128, 224)
    losses: dict[str, Tensor] = {}
    for way, switch in ways.items():
        os.environ[SWITCH] = switch
        torch.manual_seed(0)
        network = sr_vit_tiny(img_size=32, num_layers=1, num_keys=2) if dry else sr_vit_small()
        method = SimCLR(Encoder(network), **({"dim": 8, "hidden_dim": 32} if dry else {})).to(device).train()
        optimizer = build_optimizer(method, "adamw", lr=1e-4)
        views = {"global": [torch.rand(batch, 3, size, size, device=device) for _ in range(2)]}

        def take() -> None:
            optimizer.zero_grad(set_to_none=True)  # noqa: B023 - called within this turn
            with autocast(device):
                losses[way] = method(views)["loss"]  # noqa: B023
            losses[way].backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        take()
        figure(f"SimCLR by {way}, loss of the first step", float(losses[way].detach()))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(take, device, 1 if dry else 5)
        figure(f"SimCLR by {way}, images/s", batch / seconds)
        if device.type == "cuda":
            figure(f"SimCLR by {way}, GB", torch.cuda.max_memory_allocated() / 1e9)


def main() -> int:
    args = arguments(__doc__).parse_args()
    device = device_of(args.dry)
    ways = {"operations": "0"}
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        ways["kernels"] = "1"
    else:
        print("no CUDA or no Triton: only PyTorch's operations are timed", flush=True)
    attention(device, args.dry, ways)
    routed(device, args.dry, ways)
    step(device, args.dry, ways)
    return 0


if __name__ == "__main__":
    sys.exit(main())
