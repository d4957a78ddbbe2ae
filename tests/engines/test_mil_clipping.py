"""Clipping of a MIL trainer that accumulates gradients: of the sum, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cytossl_monai.engines.mil.trainer import MILTrainer


def batches(batch: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return batch, torch.zeros(1)


@pytest.mark.parametrize(("parts", "expected"), [(2, -0.5), (1, -1.0 + 1.0)])
def test_the_sum_is_clipped_and_not_its_parts(parts: int, expected: float) -> None:
    """Gradients of 10 and -9: their mean, 0.5, is below the bound of 1, though each part is far above it."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    MILTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[torch.tensor([[10.0]]), torch.tensor([[-9.0]])],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=lambda output, _: output.sum(),
        prepare_batch=batches,
        accumulation_steps=parts,
        clip_norm=1.0,
    ).run()
    assert network.weight.item() == pytest.approx(expected, abs=1e-4)


def test_what_is_left_at_the_end_of_an_epoch_is_clipped_too() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    MILTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=[torch.tensor([[30.0]])] * 3,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=lambda output, _: output.sum(),
        prepare_batch=batches,
        accumulation_steps=2,
        clip_norm=1.0,
    ).run()
    assert network.weight.item() == pytest.approx(-4.0, abs=1e-4)  # two steps an epoch, each of the bound
