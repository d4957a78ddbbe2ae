"""Training checkpoints: whole or absent, plain tensors, and strict about what they fit."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from cytossl_monai.engines.ssl.protocol import SSLRun
from cytossl_monai.engines.ssl.sharding import full_state, load_full_state, name_of
from cytossl_monai.utils.distributed import each_ones, is_main, world_size
from cytossl_monai.utils.errors import CheckpointError
from cytossl_monai.utils.files import atomic_path, read_torch

__all__ = ["check_same_step", "find_checkpoints", "load_checkpoint", "read_checkpoint", "save_checkpoint", "step_of"]

logger = logging.getLogger(__name__)
FORMAT, VERSION = "cytossl-train", 1
_FIELDS = {"step": int, "total_steps": int, "method": str, "model": dict, "optimizer": dict, "scaler": dict,
           "data": dict, "metrics": dict, "handlers": dict}  # fmt: skip
_NAME = re.compile(r"step_(\d+)\.pt$")


def save_checkpoint(trainer: SSLRun, path: str | os.PathLike[str]) -> Path:
    """Write everything that a run needs to go on, atomically. Call it in all processes; the first one writes.

    Random states are not part of it: every step seeds its own from (seed, step, process).

    Args:
        trainer: a trainer between two steps.
        path: the file.
    """
    method = trainer.method
    model_state, optimizer_state = full_state(method, trainer.optimizer)
    path = Path(path)
    if is_main():
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": trainer.state.iteration,
            "epoch_length": trainer.state.epoch_length,
            "total_steps": trainer.total_steps,
            "method": name_of(method),
            "model": model_state,
            "optimizer": optimizer_state,
            "scaler": trainer.scaler.state_dict() if trainer.scaler is not None else {},
            "world_size": world_size(),
            "data": trainer.data_fingerprint(),
            "metrics": {k: float(v) for k, v in trainer.state.metrics.items() if isinstance(v, int | float)},
            "handlers": {name: handler.state_dict() for name, handler in trainer.stateful.items()},
        }
        with atomic_path(path) as partial:
            torch.save(content, partial)
    return path


def read_checkpoint(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a training checkpoint.

    Raises:
        CheckpointError: when it is missing, damaged, or something else.
    """
    content = read_torch(path, "a checkpoint", device)
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no training checkpoint; give a step_*.pt of a pretraining run (an encoder's model.pt is loaded "
            "as the encoder's weights)"
        )
    if content.get("version") != VERSION:
        raise CheckpointError(f"checkpoint {path} is of version {content.get('version')}; this package reads {VERSION}")
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({wrong[0]} is missing or no {_FIELDS[wrong[0]].__name__}); delete it and "
            "go on from another"
        )
    return dict(content)


def load_checkpoint(trainer: SSLRun, path: str | os.PathLike[str]) -> int:
    """Put a trainer where a checkpoint was written.

    Args:
        trainer: configured as the run that wrote it.
        path: the file.

    Returns:
        the number of steps done.

    Raises:
        CheckpointError: when the file cannot be read or was made for another architecture or optimiser.
    """
    content = read_checkpoint(path)
    method = trainer.method
    _check_fits(method, content, Path(path))
    optimizer = _with_settings_of(trainer.optimizer, content["optimizer"], Path(path))
    try:
        load_full_state(method, trainer.optimizer, content["model"], optimizer)
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path} was made with another optimiser ({_first_line(error)}); restore the configuration it "
            "was trained with, or use another output_dir"
        ) from error
    if trainer.scaler is not None and content["scaler"]:
        trainer.scaler.load_state_dict(content["scaler"])
    for name, handler in trainer.stateful.items():
        if name in content["handlers"]:
            handler.load_state_dict(content["handlers"][name])
    trainer.state.metrics.update(content["metrics"])
    step = int(content["step"])
    _warn_if_changed(trainer, content)
    trainer.state.iteration = step
    trainer.state.epoch = step // trainer.state.epoch_length
    return step


def _check_fits(method: nn.Module, content: Mapping[str, Any], path: Path) -> None:
    """Compare names and shapes, and name the first that differs."""
    there = {name: tuple(value.shape) for name, value in content["model"].items() if isinstance(value, torch.Tensor)}
    here = {name: tuple(value.shape) for name, value in method.state_dict().items() if isinstance(value, torch.Tensor)}
    missing, extra = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    shapes = [name for name in here if name in there and here[name] != there[name]]
    if not (missing or extra or shapes):
        return
    if shapes:
        name = shapes[0]
        what = f"{name} is {there[name]} there and {here[name]} here"
    else:
        what = f"{missing[0]} is not in it" if missing else f"it has {extra[0]}, this one has not"
    count = len(missing) + len(extra) + len(shapes)
    raise CheckpointError(
        f"checkpoint {path} was made for another architecture ({content['method']}; {what}; {count} differences); "
        "restore the configuration it was trained with, or use another output_dir"
    )


def _with_settings_of(optimizer: Optimizer, saved: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """An optimiser's saved state with the settings of the one that goes on: what was changed since has its effect.

    PyTorch's own loading takes the settings of the file, so that other ``betas`` would be ignored, and those of another
    kind of optimiser be missed only at its first step.
    """
    own, there = optimizer.param_groups, saved.get("param_groups")
    if not isinstance(there, list) or not all(isinstance(group, dict) and "params" in group for group in there):
        raise CheckpointError(f"checkpoint {path} is damaged (its optimizer has no groups); go on from another")
    # Versions of PyTorch add settings to an optimiser, so that one side may know more; two kinds have each some of
    # their own. Adam and AdamW have the same ones and the same state.
    if len(own) == len(there) and set(own[0]) - set(there[0]) and set(there[0]) - set(own[0]):
        raise CheckpointError(
            f"checkpoint {path} was made with another optimiser (it has no {min(set(own[0]) - set(there[0]))}, which "
            f"{type(optimizer).__name__} needs); restore the configuration it was trained with, or use another "
            "output_dir"
        )
    if len(own) != len(there):
        return dict(saved)  # refused by who loads it
    groups = [{**mine, "params": group["params"]} for mine, group in zip(own, there)]
    return {**saved, "param_groups": groups}


def check_same_step(trainer: SSLRun, folder: Path | None) -> None:
    """Refuse to train where the processes go on from different steps; all processes call it.

    Raises:
        CheckpointError: names the steps.
    """
    steps = each_ones(trainer.state.iteration, trainer.state.device)
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the processes found different checkpoints in {folder} and would go on from the steps {sorted(set(steps))}"
            "; give a checkpoint_dir that all machines see"
        )


def _warn_if_changed(trainer: SSLRun, content: Mapping[str, Any]) -> None:
    """Say in words why a resumed run will not repeat the uninterrupted one."""
    before, now = content["data"], trainer.data_fingerprint()
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        logger.warning(
            "The run goes on, but not on the same samples as before: %s changed since the checkpoint.",
            ", ".join(f"{name} ({before[name]} -> {now[name]})" for name in changed),
        )
    if content["total_steps"] != trainer.total_steps:
        logger.warning(
            "The run was planned for %d steps and is now planned for %d: its schedules go on from the new plan.",
            content["total_steps"],
            trainer.total_steps,
        )


def step_of(path: Path) -> int:
    """Step of a file ``step_<n>.pt``; -1 for another name."""
    found = _NAME.search(path.name)
    return int(found.group(1)) if found else -1


def find_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The ``step_<n>.pt`` files of a folder, newest step first; unfinished files have other names."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.glob("step_*.pt") if step_of(p) >= 0), key=step_of, reverse=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
