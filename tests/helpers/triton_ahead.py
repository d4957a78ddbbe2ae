"""Compile kernels of attention for GPUs that are not there, and print what their compilers say, as JSON.

    python tests/helpers/triton_ahead.py fused|tiled 64 sm_80 sm_90        # width of a head, GPUs

The operators start their kernels as on a GPU, forward and backward, with arguments of the same kinds. Triton builds
each for the GPU that a stand-in for its driver names, and stops before it would run. A process of its own: kernels that
were imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cytossl_monai.networks.blocks.attention.in_triton import fused_op
from cytossl_monai.networks.blocks.attention.in_triton.fused import fused_attention
from cytossl_monai.networks.blocks.attention.in_triton.tiled import tiled_routed_attention
from cytossl_monai.networks.blocks.irpe import IRPE, RPEConfig, RPETables
from cytossl_monai.networks.blocks.token_layout import TokenLayout

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


class StandIn:
    """As much of a driver as building needs. Each architecture is a device: Triton keeps their kernels apart."""

    architecture = 80

    def get_current_target(self) -> GPUTarget:
        """The GPU to build for."""
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        """Its number."""
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        """None is needed."""
        return 0


def usage(binary: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, where spilled ones go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(binary)
        stream.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", stream.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", told))
    return {"registers": int(numbers["REG"]), "stack": int(numbers["STACK"])}


def fused(width: int) -> Iterator[str]:
    """Batches of numbers of tokens with blocks of their own, each kind of encoding, mask and choice; names the case."""
    encodings = {"k": ("key",), "qkv": ("key", "query", "value"), "v": ("value",), "bias": ("bias",), "none": ()}
    cases = [(length - 3, "qkv", "of all") for length in fused_op.FORWARD if length >= 64]
    cases += [(197, on, "of all") for on in encodings if on != "qkv"] + [(197, "k", "all"), (197, "qkv", "by image")]
    for length, on, keys in cases:
        yield f"{on}, {length} tokens, {keys}"
        shapes = {name: (1, 51) if name == "bias" else (1, 51, width) for name in encodings[on]}
        tables = RPETables(**{name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()})
        qkv = torch.zeros(2, length, 3, 6, width, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.zeros(length, length, dtype=torch.int16) if shapes else None
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool) if keys == "by image" else None
        keep = None if keys == "all" else (16, torch.tensor([16, 9]) if keys == "by image" else None)
        fused_attention(qkv, ids, tables, mask, keep, 0).sum().backward()


def tiled(width: int) -> Iterator[str]:
    """Two images, and each kind of encoding; names the case."""
    encodings = {"none": None, "bias": RPEConfig(mode="bias"), "k": RPEConfig(on="k"), "qk": RPEConfig(on="qk")}
    heads, grid, prefix = 6, (24, 20), 1
    for on, config in encodings.items():
        yield on
        irpe = None if config is None else IRPE(config, width, heads)
        qkv = torch.zeros(2 * (prefix + grid[0] * grid[1]), 3, heads, width, dtype=torch.bfloat16)
        parts = qkv.requires_grad_().unbind(1)
        tiled_routed_attention(*parts, TokenLayout(2, grid, prefix), irpe, 3, 32).sum().backward()


def main() -> None:
    attention, width, *architectures = sys.argv[1:]
    driver = StandIn()
    triton.runtime.driver.set_active(driver)
    rows: list[dict[str, Any]] = []
    case: dict[str, str] = {}
    start = JITFunction.run

    def build(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        built = start(kernel, *arguments, grid=grid, warmup=True, **options)
        rows.append({**case, "kernel": kernel.fn.__name__, "shared": built.metadata.shared})
        rows[-1] |= usage(built.asm["cubin"])

    JITFunction.run = build
    for architecture in architectures:
        driver.architecture = int(architecture.removeprefix("sm_"))
        for name in {"fused": fused, "tiled": tiled}[attention](int(width)):
            case.update(case=name, architecture=architecture)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
