"""What FSDP has shared out, put together again: for checkpoints, evaluation and export."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from cytossl_monai.networks.build import network_config
from cytossl_monai.networks.files import build_encoder
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.utils.distributed import is_main

__all__ = ["full_state", "is_sharded", "load_full_state", "name_of", "whole_encoder"]


def is_sharded(method: nn.Module) -> bool:
    """Whether the method's weights are shared out among processes (FSDP)."""
    return any(hasattr(parameter, "full_tensor") for parameter in method.parameters())


def name_of(method: nn.Module) -> str:
    """The method's class; FSDP puts one of its own over it."""
    return next(kind.__name__ for kind in type(method).__mro__ if not kind.__name__.startswith("FSDP"))


def _whole() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_state(method: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of method and optimiser; under FSDP gathered into the first process, so all processes must call it."""
    if not is_sharded(method):
        return method.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_state_dict

    return get_state_dict(method, optimizer, options=_whole())


def load_full_state(
    method: nn.Module, optimizer: Optimizer, model: dict[str, Any], optimizer_state: dict[str, Any]
) -> None:
    """Load what ``full_state`` gave, in all processes.

    Raises:
        ValueError: when the optimiser's groups are others.
    """
    if not is_sharded(method):
        method.load_state_dict(model)
        optimizer.load_state_dict(optimizer_state)
        return
    from torch.distributed.checkpoint.state_dict import set_state_dict

    set_state_dict(method, optimizer, model_state_dict=model, optim_state_dict=optimizer_state, options=_whole())


def whole_encoder(method: nn.Module) -> nn.Module:
    """The method's encoder as an ordinary module, to evaluate or to save.

    Under FSDP that is a copy in the first process, for which all processes must call this; the others get the encoder
    as it is, sharded, and must not run it. Otherwise it is the encoder itself.

    Args:
        method: an ``SSLMethod``.

    Raises:
        TypeError: when a sharded encoder is no ``Encoder``, which alone says how to build a copy.
    """
    encoder: Any = method.encoder
    if not is_sharded(method):
        return encoder
    if not isinstance(encoder, Encoder):
        raise TypeError(f"with FSDP the encoder must be an Encoder, not a {type(encoder).__name__}: wrap it in one")
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state = get_model_state_dict(method, options=_whole())
    if not is_main():
        return encoder
    prefix = next(name for name, module in method.named_modules() if module is encoder) + "."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    copy = build_encoder({"network": network_config(encoder.network), "pool": encoder.pool})
    copy.to(encoder.mean.device, encoder.mean.dtype).load_state_dict(own)  # normalisation included
    return copy
