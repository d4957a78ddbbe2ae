"""Shards: every slide in exactly one, the same one everywhere; what a scheduler says is believed or refused."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, strategies as st

from cytossl_monai.utils import InputError, Shard, choose_shard
from cytossl_monai.utils.shard import ALL, shard_reports


@given(st.lists(st.text(min_size=1), unique=True), st.integers(1, 9))
def test_every_slide_is_in_exactly_one_shard(names: list[str], count: int) -> None:
    parts = [Shard(i, count).select(names, str) for i in range(1, count + 1)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    # Other slides in the table change nothing.
    assert all(part[:1] == Shard(i, count).select(part[:1], str) for i, part in enumerate(parts, 1))


def test_the_hash_stays_and_deals_evenly() -> None:
    # Fixed: a run that goes on after an update must find its slides in the same shards.
    assert [Shard.of(name, 8) for name in ("slide_0000", "A-17", "é", "")] == [3, 6, 8, 5]
    sizes = Counter(Shard.of(f"slide_{i}", 8) for i in range(4000))
    assert len(sizes) == 8
    assert max(sizes.values()) < 1.25 * min(sizes.values())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "1/1"),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, "1/4"),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0"}, "4/4"),
        (
            {
                "SLURM_ARRAY_TASK_ID": "20",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "5",
            },
            "3/3",
        ),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "0", "AWS_BATCH_JOB_ARRAY_SIZE": "2"}, "1/2"),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "1", "CYTOSSL_SHARDS": "2"}, "2/2"),
        ({"JOB_COMPLETION_INDEX": "6", "CYTOSSL_SHARDS": "8"}, "7/8"),
        ({"CYTOSSL_SHARDS": "8"}, "1/1"),
    ],
)
def test_array_jobs_say_which_shard(variables: dict[str, str], expected: str) -> None:
    assert str(choose_shard(None, variables)) == expected
    assert str(choose_shard("2/3", variables)) == "2/3"


@pytest.mark.parametrize(
    ("shard", "variables", "words"),
    [
        ("9/8", {}, "shard 9/8 does not exist"),
        ("0/8", {}, "the first of n shards is 1/n"),
        ("third", {}, "not of the form i/n"),
        (None, {"JOB_COMPLETION_INDEX": "2"}, "set CYTOSSL_SHARDS"),
        (None, {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4"}, "shard 10/4 does not exist"),
        (None, {"AWS_BATCH_JOB_ARRAY_INDEX": "two"}, "AWS_BATCH_JOB_ARRAY_INDEX is 'two'"),
    ],
)
def test_what_is_no_shard_is_one_sentence(shard: str | None, variables: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        choose_shard(shard, variables)
    assert "\n" not in str(error.value)


def test_shards_of_two_numbers_do_not_meet_in_one_folder(tmp_path) -> None:
    report = tmp_path / "report.csv"
    assert ALL.claim(report) == report
    Shard(1, 4).claim(report).touch()
    assert Shard(2, 4).claim(report) == tmp_path / "report.2-of-4.csv"
    with pytest.raises(InputError, match=r"report\.1-of-4\.csv is of 4 shards and this run is shard 3/8"):
        Shard(3, 8).claim(report)
    (tmp_path / "report.old.csv").touch()
    assert list(shard_reports(report)) == [(1, 4)]
