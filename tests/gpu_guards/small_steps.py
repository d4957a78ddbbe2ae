"""Small methods, views and tiles that the guards run on a pretended device and on a real one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cytossl_monai.methods import BYOL, DINO, IBOT, MAE, MoCoV3, SimCLR, SSLMethod
from cytossl_monai.networks import Encoder, sr_vit_tiny

HEAD = {"hidden_dim": 32}
METHODS: dict[str, tuple[type[SSLMethod], dict[str, Any]]] = {
    "simclr": (SimCLR, {"dim": 8, **HEAD}),
    "moco_v3": (MoCoV3, {"dim": 8, **HEAD}),
    "byol": (BYOL, {"dim": 8, **HEAD}),
    "dino": (DINO, {"out_dim": 64, "bottleneck_dim": 16, **HEAD}),
    "ibot": (IBOT, {"out_dim": 64, "patch_out_dim": 64, "bottleneck_dim": 16, **HEAD}),
    "mae": (MAE, {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}),
}
ALLOWED: dict[str, dict[str, int]] = {
    # The hidden patches of student and teacher: how many there are differs between steps.
    "ibot": {"methods/ibot.py:forward: nonzero": 1, "losses/ibot.py:forward: nonzero": 1},
    "mae": {"losses/mae.py:forward: nonzero": 1},
}
"""Waits in forward, backward, optimiser and update of a step, beside the loss that the trainer looks at."""


def method_of(name: str) -> SSLMethod:
    torch.manual_seed(0)
    make, arguments = METHODS[name]
    network = sr_vit_tiny(img_size=32, hidden_size=24, mlp_dim=32, num_layers=1, num_heads=3, num_keys=2)
    return make(Encoder(network), **arguments).train()


def take_step(
    method: SSLMethod, views: dict[str, list[Tensor]], optimizer: torch.optim.Optimizer, call: Any = None
) -> Tensor:
    """Forward by ``call`` (the method itself, or what it was compiled to), backward, optimiser, update; the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss: Tensor = (method if call is None else call)(views)["loss"]
    loss.backward()
    optimizer.step()
    method.update(0.1)
    return loss.detach()


def views_of(name: str, seed: int = 0) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {"global": [torch.rand(4, 3, 32, 32, generator=generator) for _ in range(1 if name == "mae" else 2)]}


def tiles() -> Tensor:
    """(4, 3, 64, 64) uint8 with a dark disc each."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    out = torch.full((4, 3, 64, 64), 235, dtype=torch.uint8)
    for number in range(4):
        disc = (rows - 20 - 5 * number).square() + (columns - 30).square() < 64
        out[number, :, disc] = torch.tensor([[120], [80], [140]], dtype=torch.uint8)
    return out
