"""Whether a training diverged, and what to tell its user: where, what is likely, and what to go on from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["describe_divergence", "finite_weights"]


def finite_weights(method: nn.Module) -> Tensor:
    """() bool on the weights' device: whether all of them, under FSDP those of this process, are finite."""
    shards = (getattr(parameter, "to_local", lambda whole=parameter: whole)() for parameter in method.parameters())
    return torch.stack([torch.isfinite(shard.detach()).all() for shard in shards]).all()


def describe_divergence(trainer: Any, check_every: int, clip_norm: float | None, precision: str) -> str:
    """A sentence or three about a loss, or a weight, that became NaN or infinite.

    Args:
        trainer: the run: its state, optimiser, length and last checkpoint.
        check_every: steps between two looks at the loss.
        clip_norm: largest norm of the gradient; None: it is not clipped.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    """
    step = trainer.state.iteration
    first = step if check_every == 1 else max(1, step - check_every + 1)
    where = f"at step {step}" if first == step else f"between steps {first} and {step}"
    lr = max(float(group["lr"]) for group in trainer.optimizer.param_groups)
    causes = [f"a learning rate too high or a warm-up too short (now {lr:.2e})"]
    if clip_norm is None:
        causes.append("gradients that are not clipped (set clip_norm)")
    if precision == "fp16":
        causes.append("float16 that overflows (set precision to bf16 or fp32)")
    causes.append("a temperature too low, or a batch without contrast")
    kept = trainer.last_checkpoint
    then = f"The last good checkpoint is {kept}" if kept is not None else "No checkpoint had been written yet"
    return (
        f"The loss or a weight became NaN or infinite {where} of {trainer.total_steps}. Likely causes: "
        f"{'; '.join(causes)}. {then}; change one of these and start again."
    )
