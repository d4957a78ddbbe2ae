"""Compile the kernels of tiled attention for GPUs that are not there, and print what their compilers say, as JSON.

    python tests/helpers/triton_ahead.py [width of a head] [sm_80 sm_90 ...]

A process of its own: kernels that this process had imported for the interpreter could not be compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cytossl_monai.networks.blocks.attention import tiled_backward, tiled_kernels
from cytossl_monai.networks.blocks.attention.tiled_ops import LAUNCHES

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
OF_INTEGERS = ("canvas_ptr", "extra_ptr", "place_ptr", "bucket_ptr", "sequence_ptr")
IN_FLOAT32 = ("lse_ptr", "delta_ptr", "score_ptr", "part_k_ptr", "part_v_ptr", "of_by_query_ptr", "of_by_key_ptr")


def source(kernel, constants):
    """A kernel with arguments as the operators give them: bf16, pointers and strides that divide by 16."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if name in OF_INTEGERS else "*fp32" if name in IN_FLOAT32 else "*bf16"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if name.endswith("_ptr") or name in ("stride_row", "stride_head"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def usage(binary: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, where spilled ones go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(binary)
        stream.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", stream.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", told))
    return {"registers": int(numbers["REG"]), "stack": int(numbers["STACK"])}


def main() -> None:
    width, *architectures = sys.argv[1:] or ["64", "sm_80", "sm_90"]
    rows = []
    for name in [*LAUNCHES, "add_parts", "class_scores"]:
        kernel = getattr(tiled_kernels, name, None) or getattr(tiled_backward, name)
        products = {"none": (False, False), "k": (True, False), "qk": (True, True)}
        for on, (by_query, by_key) in products.items() if name in LAUNCHES else [("none", (False, False))]:
            constants = {"WIDTH": int(width), "WINDOW": 3, "BY_QUERY": by_query, "BY_KEY": by_key}
            constants |= {"PREFIX": 16, "EXTRAS": 64, "CHUNK": 64}
            options = {"num_warps": 4}
            if name in LAUNCHES:
                launch = LAUNCHES[name]
                constants["CHUNK"] = launch.chunk
                options = {"num_warps": launch.warps, "num_stages": launch.stages}
            constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
            for architecture in architectures:
                target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
                built = triton.compile(source(kernel, constants), target=target, options=options)
                row = {"kernel": name, "on": on, "architecture": architecture, "shared": built.metadata.shared}
                rows.append(row | (usage(built.asm["cubin"]) if os.path.exists(CUOBJDUMP) else {}))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
