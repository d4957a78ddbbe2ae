"""Triton kernels without a GPU: interpreted on CPU tensors, and compiled ahead for GPUs that are not here."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

KERNELS = "cytossl_monai.networks.blocks.attention."
WANTED = "needs Triton: pip install -r requirements-triton.txt"
# Bytes of shared memory that a block may have, by compute capability (A100, H100).
SHARED = {80: 163 * 1024, 90: 227 * 1024}


def device_of_kernels() -> torch.device:
    """Where kernels run: a GPU, or the CPU by Triton's interpreter (`conftest` turns it on). Skips without Triton."""
    triton = pytest.importorskip("triton", reason=WANTED)
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert triton.knobs.runtime.interpret
    return torch.device("cpu")


def compiled_ahead(
    module: str, kernel: str, types: dict[str, str], cases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Compile a kernel for each case, for compute capability 8.0 and 9.0, in a process without the interpreter.

    Args:
        module: the kernels' module in the attention room.
        kernel: its name.
        types: Triton's name of each argument's type; ``*bf16`` where none is given. Constants need none.
        cases: ``constants``, ``num_warps``, ``num_stages``.

    Returns:
        for each case and capability: ``arch``, ``shared`` (bytes), ``registers`` and ``stack`` (bytes spilled).
    """
    pytest.importorskip("triton", reason=WANTED)
    asked = json.dumps({"module": KERNELS + module, "kernel": kernel, "types": types, "cases": cases})
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], input=asked, capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _compile(kernel: Any, types: dict[str, str], case: dict[str, Any], arch: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, constants = kernel.arg_names, case["constants"]
    signature = {n: "constexpr" if n in constants else types.get(n, "*bf16") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"]}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = next(Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        used = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", used)
    assert numbers is not None, used
    return {
        "arch": arch,
        "shared": built.metadata.shared,
        "registers": int(numbers[1]),
        "stack": int(numbers[2]),
        "constants": constants,
    }


def _main() -> None:
    asked = json.load(sys.stdin)
    kernel = getattr(importlib.import_module(asked["module"]), asked["kernel"])
    found = [_compile(kernel, asked["types"], case, arch) for case in asked["cases"] for arch in SHARED]
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
