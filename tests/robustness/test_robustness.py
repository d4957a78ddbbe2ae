"""A small part of the campaign; ``CYTOSSL_ROBUSTNESS=200`` runs so many cases of each class, a tenth as many kills."""

from __future__ import annotations

import os

import pytest
from campaign import run_malformed
from kills import STEPS, run_kills
from malformed import CLASSES

CASES = int(os.environ.get("CYTOSSL_ROBUSTNESS", "2"))


@pytest.fixture(scope="module")
def counts():
    return run_malformed(CASES)


@pytest.mark.parametrize("name", list(CLASSES))
def test_malformed_inputs_are_read_or_refused_in_a_sentence(counts, name):
    found = counts[name]
    assert sum(found.values()) == CASES
    bad = {outcome: found[outcome] for outcome in ("traceback", "died", "slow", "escaped") if found[outcome]}
    assert not bad


def test_killed_runs_come_back_equal():
    short = {name: STEPS[name] for name in ("index", "embed")}
    for step, found in run_kills(max(1, CASES // 10), steps=STEPS if CASES >= 20 else short).items():
        assert set(found) <= {"equal", "too late"}, (step, found)
