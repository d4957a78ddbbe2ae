"""Masks: right in number and shape, determined by the sample's number alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cytossl_monai.methods.parts.masking import SampleCounter, block_mask, block_masks, kept_patches, sample_rng

CPU = torch.device("cpu")


def masks(first: int, batch: int, seed: int = 0, probability: float = 1.0) -> torch.Tensor:
    return block_masks(first, batch, 2, (14, 14), probability, (0.1, 0.5), seed, CPU)


def test_block_masks_do_not_depend_on_the_batch() -> None:
    whole = masks(100, 6).view(2, 6, -1)
    parts = torch.cat([masks(100, 2).view(2, 2, -1), masks(102, 4).view(2, 4, -1)], dim=1)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, masks(106, 6).view(2, 6, -1))
    assert not torch.equal(whole, masks(100, 6, seed=1).view(2, 6, -1))
    assert not torch.equal(whole[0], whole[1])


def test_share_of_masked_views_and_patches() -> None:
    drawn = masks(0, 400, probability=0.5)
    shares = drawn.float().mean(1)
    assert (shares > 0).float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert shares.max() <= 0.5
    assert shares[shares > 0].mean().item() == pytest.approx(0.3, abs=0.03)


def test_hidden_patches_stand_in_blocks() -> None:
    """Of the neighbours of a hidden patch, more are hidden than by chance."""
    together = []
    for sample in range(50):
        mask = block_mask(sample_rng(0, sample, 0), 14, 14, 60)
        assert 40 <= mask.sum() <= 60
        together.append((mask[:, 1:] & mask[:, :-1]).sum() / max(mask[:, :-1].sum(), 1))
    assert np.mean(together) > 0.7  # 60 of 196 at random: 0.3


@pytest.mark.parametrize(("rows", "columns", "hidden"), [(1, 1, 1), (2, 7, 5), (4, 4, 16), (3, 3, 0)])
def test_block_mask_of_small_grids(rows: int, columns: int, hidden: int) -> None:
    mask = block_mask(sample_rng(3, 1, 0), rows, columns, hidden)
    assert mask.shape == (rows, columns)
    assert mask.sum() <= hidden


def test_kept_patches_are_a_uniform_draw_without_replacement() -> None:
    keep = kept_patches(0, 3000, 1, 16, 4, 0, CPU)
    assert keep.shape == (3000, 4)
    assert (keep.diff(dim=1) > 0).all()
    counts = torch.bincount(keep.flatten(), minlength=16) / 3000
    assert torch.allclose(counts, torch.full((16,), 0.25), atol=0.04)
    whole = kept_patches(40, 4, 2, 16, 4, 0, CPU).view(2, 4, 4)
    parts = torch.cat([kept_patches(40 + i, 1, 2, 16, 4, 0, CPU).view(2, 1, 4) for i in range(4)], dim=1)
    assert torch.equal(whole, parts)


def test_weights_of_the_draw() -> None:
    """One patch of four, weights 1 and exp(-2): the first draw is in proportion."""
    hiding = torch.tensor([[0.0, 0.0, 2.0, 2.0]]).expand(4000, -1)
    keep = kept_patches(0, 4000, 1, 4, 1, 0, CPU, hiding)
    share = torch.bincount(keep.flatten(), minlength=4)[2:].sum().item() / 4000
    assert share == pytest.approx(np.exp(-2) / (1 + np.exp(-2)), abs=0.02)


def test_counter_resumes_and_stands_still_in_evaluation() -> None:
    counter = SampleCounter()
    assert [counter.take(8), counter.take(8)] == [0, 8]
    other = SampleCounter()
    other.load_state_dict(counter.state_dict())
    assert other.take(4) == 16
    other.eval()
    assert [other.take(4), other.take(4)] == [20, 20]


def test_counting_samples_compiles_nothing_anew() -> None:
    """The count changes at every step; a compiled method that saw it as a constant would compile every step."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, example: list) -> Any:
        compiled.append(graph)
        return graph.forward

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counter = SampleCounter()
            self.linear = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            self.counter.take(len(x))
            return self.linear(x)

    torch._dynamo.reset()
    module = Counting().train()
    step = torch.compile(module, backend=backend)
    step(torch.rand(4, 2))
    after_one = len(compiled)
    for _ in range(4):
        step(torch.rand(4, 2))
    assert len(compiled) == after_one
    assert int(module.counter.seen) == 20


@pytest.mark.parametrize(("grid", "least"), [((14, 14), 16), ((6, 6), 4), ((7, 12), 4), ((32, 32), 100)])
def test_blocks_are_as_large_as_ibots(grid: tuple[int, int], least: int) -> None:
    """The smallest block is (min(H, W) // 3) ** 2 patches before rounding, not four whatever the grid is."""
    rows, columns = grid
    hidden = int(0.5 * rows * columns)
    drawn = []

    class Recorded:
        def __init__(self, sample: int) -> None:
            self.rng = sample_rng(0, sample, 0)

        def uniform(self, low: float, high: float) -> float:
            if low >= 0:
                drawn.append((low, high))
            return float(self.rng.uniform(low, high))

        def integers(self, low: int, high: int) -> int:
            return int(self.rng.integers(low, high))

    for sample in range(20):
        block_mask(Recorded(sample), rows, columns, hidden)  # type: ignore[arg-type]
    assert drawn[0] == (least, hidden)
    assert all(least in pair for pair in drawn)
