"""The momentum teacher: a copy of the student that follows it as an exponential moving average."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["follow", "make_teacher", "set_teacher_mode"]

M = TypeVar("M", bound=nn.Module)


def make_teacher(student: M) -> M:
    """A copy of ``student`` that gradients never reach, in the mode of :func:`set_teacher_mode`."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    set_teacher_mode(teacher, training=True)
    return teacher


def set_teacher_mode(teacher: nn.Module, training: bool) -> None:
    """Teachers never drop anything, and while training normalise with the statistics of the batch.

    The published teachers are built without drop path, and their batch normalisation runs on the batch (MoCo v3, BYOL,
    DINO with ResNets): running averages would lag behind moving weights.

    Args:
        teacher: set to ``eval``, except its batch normalisation.
        training: mode of the batch normalisation.
    """
    teacher.eval()
    for module in teacher.modules():
        if isinstance(module, _BatchNorm):
            module.train(training)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """``teacher = momentum * teacher + (1 - momentum) * student``, parameter by parameter, in place.

    Buffers are not averaged: the running statistics of batch normalisation are the teacher's own, as published.

    Args:
        teacher: made by :func:`make_teacher` of this ``student``.
        student: the module that is trained.
        momentum: in [0, 1]; 1 leaves the teacher as it is.

    Raises:
        ValueError: for a momentum outside [0, 1].
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if t.is_floating_point()]
    if pairs and momentum < 1.0:
        # One fused launch for all parameters of one device and dtype, instead of one for each.
        torch._foreach_lerp_([t for t, _ in pairs], [s.detach() for _, s in pairs], 1.0 - momentum)
