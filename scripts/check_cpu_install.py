"""Fail if an environment that was set up for a CPU holds a CUDA package.

.venv/bin/python scripts/check_cpu_install.py
"""

from __future__ import annotations

import importlib.metadata
import sys

CUDA_PREFIXES = ("nvidia-", "cupy", "cuda-", "triton", "pytorch-triton")


def main() -> int:
    names = sorted({(dist.metadata["Name"] or "").lower() for dist in importlib.metadata.distributions()})
    cuda = [name for name in names if name.startswith(CUDA_PREFIXES)]
    if cuda:
        print(f"CUDA packages in a CPU installation: {', '.join(cuda)}", file=sys.stderr)
        return 1
    print(f"{len(names)} packages installed, none of them CUDA")
    return 0


if __name__ == "__main__":
    sys.exit(main())
