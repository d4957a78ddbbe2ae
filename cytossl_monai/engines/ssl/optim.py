"""Optimisers for self-supervised training: who is decayed, who learns how fast, Adam, AdamW and LARS."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from cytossl_monai.engines.ssl.wrap import unwrap
from cytossl_monai.methods.base import trained_encoder

__all__ = [
    "LARS",
    "build_optimizer",
    "clip_gradients",
    "is_undecayed",
    "layer_of",
    "param_groups",
    "scaled_lr",
    "set_hyperparameters",
]

UNDECAYED_NAMES = ("cls_token", "mask_token", "pos_embed", "position", "rpe", "register", "token", "temperature")
"""Parts of a parameter's name that mean a token or a table of positions: decay would only pull them to nothing."""


def is_undecayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is left out: biases, norms and other vectors, tokens, position tables."""
    leaf = name.split(".")
    return parameter.ndim <= 1 or any(part in piece for piece in leaf[-2:] for part in UNDECAYED_NAMES)


def layer_of(name: str, depth: int) -> int:
    """The layer of an encoder's parameter: 0 for the patch embedding, 1.. for the blocks, ``depth + 1`` after them."""
    found = re.search(r"\b(?:blocks|layers)\.(\d+)\.", name)
    if found:
        return int(found.group(1)) + 1
    residual = re.search(r"\blayer(\d)\.", name)  # a ResNet's four stages
    if residual:
        return int(residual.group(1))
    if any(
        part in name for part in ("patch_embed", "cls_token", "pos_embed", "mask_token", "conv1", "bn1", "embedding")
    ):
        return 0
    return depth + 1


def encoder_depth(encoder: nn.Module) -> int:
    """Number of layers that ``layer_of`` tells apart in the blocks."""
    return max((layer_of(name, 0) for name, _ in encoder.named_parameters()), default=0)


def param_groups(
    method: nn.Module,
    weight_decay: float,
    layer_decay: float | None = None,
    no_decay: Callable[[str, Tensor], bool] = is_undecayed,
) -> list[dict[str, Any]]:
    """Sort the trained parameters into groups.

    Every group says ``lr_scale`` and ``wd_scale``, which the schedules multiply by.

    Args:
        method: the method; parameters that need no gradient (teachers, a frozen patch projection) are left out.
        weight_decay: for weights of two or more dimensions.
        layer_decay: for continued pretraining: the last block learns at the full rate, each one before it at
            ``layer_decay`` times the next one's (Clark et al., ICLR 2020; Bao et al., ICLR 2022). Heads learn at the
            full rate.
        no_decay: says by name and value who is not decayed.

    Returns:
        parameter groups for an optimiser, with ``name`` for logs. Their order depends on the architecture only.
    """
    method = unwrap(method)
    encoder = trained_encoder(method)
    inside = {id(p): name for name, p in encoder.named_parameters()} if isinstance(encoder, nn.Module) else {}
    depth = encoder_depth(encoder) if isinstance(encoder, nn.Module) else 0
    groups: dict[tuple[int | None, bool], dict[str, Any]] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(inside[id(parameter)], depth) if layer_decay is not None and id(parameter) in inside else None
        free = no_decay(name, parameter)
        if (layer, free) not in groups:
            scale = 1.0 if layer is None or layer_decay is None else layer_decay ** max(0, depth - layer)
            groups[layer, free] = {
                "name": f"{'heads' if layer is None and inside else f'layer {layer}' if layer is not None else 'all'}"
                f"{', no decay' if free else ''}",
                "params": [],
                "lr_scale": scale,
                "wd_scale": 0.0 if free else 1.0,
                "weight_decay": 0.0 if free else weight_decay,
            }
        groups[layer, free]["params"].append(parameter)
    if not groups:
        raise ValueError("the method has no parameter that needs a gradient: nothing to train")
    return list(groups.values())


def scaled_lr(base_lr: float, batch_size: int, reference: int = 256) -> float:
    """Linear scaling rule (Goyal et al., 2017): ``base_lr * batch_size / reference``.

    Args:
        base_lr: learning rate for a batch of ``reference``.
        batch_size: samples a step, over all processes.
        reference: batch that ``base_lr`` was found for.
    """
    return base_lr * batch_size / reference


def clip_gradients(optimizer: Optimizer, norm: float, by: Literal["all", "parameter"] = "all") -> Tensor:
    """Bound the gradients of what an optimiser trains, in place.

    Args:
        optimizer: whose parameters.
        norm: largest norm.
        by: ``"all"``: of all gradients together, which keeps their direction. ``"parameter"``: of each parameter's, as
            DINO and iBOT are published; a large layer then does not shrink the steps of the others.

    Returns:
        the norm of all gradients before.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if by == "all":
        return nn.utils.clip_grad_norm_(parameters, norm).detach()
    total: Tensor = nn.utils.get_total_norm([p.grad for p in parameters]).detach()
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, norm)
    return total


def set_hyperparameters(optimizer: Optimizer, lr: float | None = None, weight_decay: float | None = None) -> None:
    """Give every group its share of a scheduled learning rate and weight decay; None leaves one as it is."""
    for group in optimizer.param_groups:
        if lr is not None:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if weight_decay is not None:
            group["weight_decay"] = weight_decay * group.get("wd_scale", 1.0)


def build_optimizer(
    method: nn.Module,
    name: str = "adamw",
    lr: float = 1.0e-3,
    weight_decay: float = 0.05,
    betas: Sequence[float] = (0.9, 0.95),
    momentum: float = 0.9,
    layer_decay: float | None = None,
) -> Optimizer:
    """The optimiser of a method.

    Args:
        method: what is trained, already on its device, wrapped or not.
        name: ``"adam"`` (the paper's), ``"adamw"``, ``"lars"`` or ``"sgd"``; the first two are fused on CUDA.
        lr: learning rate; a schedule sets it anew at every step.
        weight_decay: see ``param_groups``.
        betas: decay rates of Adam and AdamW.
        momentum: of LARS and SGD.
        layer_decay: see ``param_groups``.

    Raises:
        ValueError: when the name is unknown or nothing needs a gradient.
    """
    groups = param_groups(method, weight_decay, layer_decay)
    on_cuda = all(p.is_cuda for group in groups for p in group["params"])
    if name in ("adam", "adamw"):
        first, second = betas
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        return kind(groups, lr=lr, betas=(first, second), weight_decay=weight_decay, fused=on_cuda or None)
    if name == "lars":
        return LARS(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
    raise ValueError(f"unknown optimiser {name!r}; choose adam, adamw, lars or sgd")


class LARS(Optimizer):
    """SGD with momentum whose step is scaled per tensor to the weights' norm.

    You, Gitman and Ginsburg, *Large Batch Training of Convolutional Networks*, 2017, in the form that BYOL and SimCLR
    use: vectors (biases, norms; groups with ``wd_scale == 0``) are neither decayed nor adapted.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: of the velocity.
        weight_decay: added to the gradient before the step is scaled.
        trust: the paper's coefficient eta.
        eps: keeps the ratio finite.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 1.5e-6,
        trust: float = 1.0e-3,
        eps: float = 1.0e-8,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"lr and weight_decay must be >= 0 and momentum in [0, 1), got {lr}, {weight_decay}, {momentum}"
            )
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1 and group.get("wd_scale", 1.0) > 0:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    weight_norm, update_norm = parameter.norm(), update.norm()
                    ratio = group["trust"] * weight_norm / (update_norm + group["eps"])
                    # torch.where, not a Python comparison: no wait for the device.
                    update = update * torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
                state = self.state[parameter]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(parameter)
                velocity = state["velocity"].mul_(group["momentum"]).add_(update)
                parameter.add_(velocity, alpha=-group["lr"])
        return loss
