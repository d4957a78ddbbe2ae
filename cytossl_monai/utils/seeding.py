"""Seeds as a function of where a run stands, so that a resumed run draws what the uninterrupted one would have."""

from __future__ import annotations

import random

import numpy as np
import torch

__all__ = ["derive_seed", "seed_all"]


def derive_seed(*parts: int) -> int:
    """A well-mixed 63-bit seed for the tuple ``parts``, for example (run seed, step, rank).

    Neighbouring tuples give unrelated seeds, which ``seed + step`` would not.

    Args:
        parts: non-negative integers.

    Returns:
        an integer in [0, 2**63), good for ``torch.Generator.manual_seed``.
    """
    # The length goes in too: a seed sequence takes (0,) and (0, 0) for the same.
    state = np.random.SeedSequence([len(parts), *(int(part) for part in parts)]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global state
    torch.manual_seed(seed)
