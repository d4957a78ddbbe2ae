"""The order of the samples: shares, coverage, bounded slides a batch, and nothing but (seed, step) behind it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cytossl_monai.data.tiles.sampler import SSLBatchSampler, TileStream, group_quotas
from cytossl_monai.utils.seeding import derive_seed


class Source:
    """``sizes[g]`` items of group g."""

    def __init__(self, sizes: list[int], weights: np.ndarray | None = None) -> None:
        self.groups = np.repeat(np.arange(len(sizes)), sizes)
        self.weights = weights

    def __len__(self) -> int:
        return len(self.groups)


def items(batch: list[tuple[int, int]]) -> list[int]:
    return [item for item, _ in batch]


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=20).filter(lambda s: sum(s) > 0),
    st.integers(1, 2000),
    st.floats(0, 1),
)
def test_quotas_sum_up_and_follow_the_power(sizes: list[int], total: int, power: float) -> None:
    quotas = group_quotas(np.array(sizes), total, power)
    assert quotas.sum() == total
    share = np.array([float(s) ** power if s else 0.0 for s in sizes])
    assert np.abs(quotas - share / share.sum() * total).max() < 1 + 1e-6


def test_a_pass_by_tiles_is_a_permutation() -> None:
    stream = TileStream(Source([40, 7, 100, 1]), seed=1, group_power=1.0)
    order = stream.order(0)
    assert sorted(order) == list(range(148))
    assert (order != np.arange(148)).any()
    assert (stream.order(1) != order).any()


def test_one_huge_slide_does_not_rule() -> None:
    source = Source([10_000, 100, 100])
    by_group = np.bincount(source.groups[TileStream(source, group_power=0.0).order(0)])
    np.testing.assert_allclose(by_group, 3400, atol=1)
    by_root = np.bincount(source.groups[TileStream(source, group_power=0.5).order(0)])
    np.testing.assert_allclose(by_root / by_root.sum(), np.array([100, 10, 10]) / 120, atol=1e-3)


def test_repeats_are_even_where_a_slide_is_too_small_for_its_quota() -> None:
    source = Source([1000, 10])
    counts = np.bincount(TileStream(source, group_power=0.0).order(0), minlength=1010)
    assert counts[1000:].max() - counts[1000:].min() <= 1
    assert counts[:1000].max() == 1


def test_weights_decide_who_is_drawn() -> None:
    weights = np.ones(3000)
    weights[:1000], weights[2000:] = 4.0, 0.0
    source = Source([3000], weights)
    drawn = TileStream(source, seed=3).take(0, 30_000)
    counts = np.array([(drawn < 1000).sum(), ((drawn >= 1000) & (drawn < 2000)).sum(), (drawn >= 2000).sum()])
    np.testing.assert_allclose(counts / 30_000, [0.8, 0.2, 0.0], atol=1e-3)
    one_pass = np.bincount(TileStream(source, seed=3).order(0), minlength=3000)
    assert set(one_pass[:1000]) <= {2, 3}  # 4 of 5000 parts of 3000 draws: 2.4
    assert set(one_pass[1000:2000]) <= {0, 1}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8))
def test_a_batch_draws_from_few_slides(window: int, chunk: int) -> None:
    source = Source([50] * 40)
    sampler = SSLBatchSampler(source, batch_size=16, seed=0, window=window, chunk=chunk)
    for step in range(8):
        slides = len(set(source.groups[items(sampler.batch(step))]))
        assert slides <= window * (2 + 16 // (window * chunk))


def test_slides_are_mixed_within_a_batch() -> None:
    source = Source([200] * 40)
    sampler = SSLBatchSampler(source, batch_size=64, window=16, chunk=32)
    mixed = [len(set(source.groups[items(sampler.batch(step))])) for step in range(20)]
    assert np.mean(mixed) > 12


def test_any_step_is_computed_alone() -> None:
    source = Source([30, 50, 9])
    running = iter(SSLBatchSampler(source, 8, seed=4))
    batches = [next(running) for _ in range(40)]  # several passes
    later = SSLBatchSampler(source, 8, seed=4)
    later.set_start_step(33)
    assert next(iter(later)) == batches[33]
    assert SSLBatchSampler(source, 8, seed=5).batch(33) != batches[33]
    samples = [sample for batch in batches for _, sample in batch]
    assert samples == list(range(40 * 8))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_joined_batch(world: int) -> None:
    source = Source([30, 50, 9])
    whole = SSLBatchSampler(source, 8, seed=4)
    parts = [SSLBatchSampler(source, 8 // world, seed=4, rank=r, world_size=world) for r in range(world)]
    for step in (0, 7):
        assert [pair for part in parts for pair in part.batch(step)] == whole.batch(step)
    assert len(whole) == len(parts[0]) == 89 // 8


def test_sources_are_mixed_by_their_shares() -> None:
    small, large = Source([20]), Source([500, 500])
    mixed = SimpleNamespace(sources=[small, large], offsets=[0, 20], shares=[3.0, 1.0])
    dataset = type("Mixed", (), {**mixed.__dict__, "__len__": lambda self: 1020, "weights": None, "groups": None})()
    sampler = SSLBatchSampler(dataset, 10, seed=0)
    drawn = np.concatenate([items(sampler.batch(step)) for step in range(100)])
    assert (drawn < 20).sum() == 750
    per_batch = [(np.array(items(sampler.batch(step))) < 20).sum() for step in range(100)]
    assert set(per_batch) <= {7, 8}
    counts = np.bincount(drawn[drawn < 20])
    assert counts.max() - counts.min() <= 1


def test_fingerprint_changes_with_what_the_order_depends_on() -> None:
    prints = [
        SSLBatchSampler(Source(sizes), batch, seed=seed).fingerprint()
        for sizes, batch, seed in (([30, 9], 8, 0), ([30, 9], 8, 1), ([30, 8], 8, 0), ([30, 9], 4, 0))
    ]
    assert len({str(p) for p in prints}) == 4
    assert prints[0] == SSLBatchSampler(Source([30, 9]), 8, seed=0).fingerprint()


def test_wrong_arguments() -> None:
    source = Source([5])
    with pytest.raises(ValueError, match="batch_size"):
        SSLBatchSampler(source, 0)
    with pytest.raises(ValueError, match="rank"):
        SSLBatchSampler(source, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="empty"):
        SSLBatchSampler(Source([0]), 1)
    with pytest.raises(ValueError, match="weights"):
        SSLBatchSampler(Source([3], np.array([1.0, -1.0, 0.0])), 1)
    with pytest.raises(ValueError, match="epoch_length"):
        SSLBatchSampler(source, 1, epoch_length=-1)


def test_seeds_are_spread_and_independent_of_their_neighbours() -> None:
    seeds = np.array([derive_seed(7, number) for number in range(4096)])
    assert len(np.unique(seeds)) == 4096
    assert seeds.min() >= 0
    bits = ((seeds[:, None] >> np.arange(63)) & 1).mean(0)
    np.testing.assert_allclose(bits, 0.5, atol=0.04)  # five deviations of 4096 coins
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(0, 0) != derive_seed(0)


def test_a_batch_larger_than_the_data_set_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        SSLBatchSampler(Source([30, 9]), 39, seed=0)
        assert not caplog.messages
        SSLBatchSampler(Source([30, 9]), 20, seed=0, world_size=2)
    assert "takes 40 samples and there are 39" in caplog.text
