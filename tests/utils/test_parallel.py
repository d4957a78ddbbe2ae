import os
import signal
import time

import pytest

from cytossl_monai.utils.errors import InputError, RunError, WorkerDiedError
from cytossl_monai.utils.parallel import Outcome, default_workers, raise_failures, run_parallel


def work(item):
    if item == "raise":
        raise KeyError("no")
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "exit":
        os._exit(7)
    if item == "unpicklable":
        return lambda: None
    if item == "bad error":
        raise Unpicklable
    if item == "two arguments":
        raise TwoArguments("slide 3", 7)
    if item == "sticky":
        return Sticky()
    if item == "pid":
        time.sleep(0.2)
        return os.getpid()
    return item * 2


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("stays here")


class TwoArguments(Exception):
    """Pickles, and does not unpickle: what many libraries raise."""

    def __init__(self, where, code):
        super().__init__(f"{where}: code {code}")


class Sticky:
    """A result that pickles, and does not unpickle."""

    def __reduce__(self):
        return int, ("not a number",)


def outcomes(items, **kwargs):
    return {o.item: o for o in run_parallel(work, items, progress=False, **kwargs)}


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_and_exceptions(num_workers):
    found = outcomes([1, 2, "raise", 3], num_workers=num_workers)
    assert {k: v.result for k, v in found.items()} == {1: 2, 2: 4, 3: 6, "raise": None}
    assert isinstance(found["raise"].error, KeyError)
    with pytest.raises(KeyError):
        found["raise"].unwrap()
    assert found[2].unwrap() == 4


@pytest.mark.parametrize("num_workers", [1, 2])
def test_killed_workers_cost_only_their_item(num_workers):
    items = ["kill", 1, "exit", 2, 3, 4, 5]
    found = outcomes(items, num_workers=num_workers)
    assert {k: v.result for k, v in found.items() if v.error is None} == {i: 2 * i for i in (1, 2, 3, 4, 5)}
    assert isinstance(found["kill"].error, WorkerDiedError)
    assert "SIGKILL" in str(found["kill"].error)
    assert "exit status 7" in str(found["exit"].error)


def test_every_worker_killed():
    found = list(run_parallel(work, ["kill"] * 5, num_workers=2, progress=False))
    assert [type(o.error) for o in found] == [WorkerDiedError] * 5


def test_what_cannot_be_sent_back_is_an_error():
    found = outcomes(["unpicklable", "bad error", 1], num_workers=1)
    assert found["unpicklable"].result is None
    assert isinstance(found["unpicklable"].error, RuntimeError)
    assert "Unpicklable" in str(found["bad error"].error)
    assert found[1].result == 2


def test_what_does_not_unpickle_costs_only_its_item():
    found = outcomes([1, "two arguments", 2, "sticky", 3], num_workers=2)
    assert {k: v.result for k, v in found.items() if v.error is None} == {1: 2, 2: 4, 3: 6}
    assert str(found["two arguments"].error) == "TwoArguments: slide 3: code 7"
    assert "cannot be read" in str(found["sticky"].error)


def test_runs_in_processes_of_its_own():
    pids = {o.result for o in run_parallel(work, ["pid"] * 4, num_workers=2, progress=False)}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_stopping_early_leaves_no_process():
    import multiprocessing

    others = set(multiprocessing.active_children())  # of tests before this one, on their way out
    run = run_parallel(work, ["pid"] * 6, num_workers=2, progress=False)
    next(run)
    assert set(multiprocessing.active_children()) - others
    run.close()
    for process in set(multiprocessing.active_children()) - others:
        process.join(30)  # asked to end; on a busy machine it may take a moment
    assert not set(multiprocessing.active_children()) - others


def test_workers_end_though_the_parent_obeys_sigterm_in_its_own_way():
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        found = outcomes(["pid", "pid", 1], num_workers=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found[1].result == 2


def test_spawned_workers():
    found = list(run_parallel(abs, [-1, -2], num_workers=1, progress=False, start_method="spawn"))
    assert sorted(o.result for o in found) == [1, 2]


def test_progress_bar(capsys):
    list(run_parallel(abs, [-1, -2], title="making"))
    assert "making: 100%" in capsys.readouterr().err


def test_failures_are_told_in_one_sentence_each_reason_once():
    raise_failures([], 3, "folds")
    full, torn = OSError("disk full"), InputError("a.h5 is torn")
    with pytest.raises(RunError, match=r"^3 of 4 folds failed \(0, 2: disk full; 1: a.h5 is torn\); the others"):
        raise_failures([Outcome(0, error=full), Outcome(1, error=torn), Outcome(2, error=full)], 4, "folds")
    with pytest.raises(InputError, match=r"^a.h5 is torn$"):  # what fails them all is said as it is
        raise_failures([Outcome(0, error=torn), Outcome(1, error=InputError("a.h5 is torn"))], 2, "folds")


def test_arguments():
    assert default_workers() >= 1
    assert list(run_parallel(work, [], num_workers=4)) == []
    with pytest.raises(ValueError, match="num_workers"):
        list(run_parallel(work, [1], num_workers=-1))
    assert Outcome(1).unwrap() is None
