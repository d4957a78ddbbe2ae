"""One rule for an item that fails: it costs only itself, and the report says why."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cytossl_monai.utils.errors import SlideError
from cytossl_monai.utils.files import write_text
from cytossl_monai.utils.report import RunReport

FAILURES = [
    SlideError("a.svs states no resolution"),
    OSError(28, "No space left on device", "x.h5"),
    RuntimeError("odd"),
]


def test_a_failing_item_costs_only_itself() -> None:
    report = RunReport("try")
    for number, error in enumerate([None, *FAILURES, MemoryError("too large"), None]):
        with report.item(str(number)) as line:
            line.message = "fine"
            if error is not None:
                raise error
    assert [item.status for item in report.items] == ["done", *["failed"] * 4, "done"]
    assert report.items[0].message == "fine"
    assert report.items[1].message == "a.svs states no resolution"
    assert "No space left on device" in report.items[2].message
    assert "RuntimeError: odd" in report.items[3].message
    assert report.exit_code == 3


def test_an_item_may_be_current_and_left_early() -> None:
    report = RunReport("try")
    for _ in range(2):
        with report.item("a") as line:
            line.status = "current"
            continue
    assert [item.status for item in report.items] == ["current", "current"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_asked_to_stop_stops(stop: type[BaseException]) -> None:
    report = RunReport("try")
    with pytest.raises(stop), report.item("a"):
        raise stop
    assert report.items == []


def test_what_utf8_has_not_is_written_out(tmp_path: Path) -> None:
    """A byte of a file name, or of another tool's text, that is not UTF-8 costs no run its report."""
    report = RunReport("try", tmp_path / "report.csv")
    report.add("a\udcfc", "failed", "M\udcfcller.svs is torn")
    report.save()
    with open(tmp_path / "report.csv", newline="", encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["item"], row["message"]) == (r"a\udcfc", r"M\udcfcller.svs is torn")
    write_text(tmp_path / "page.json", json.dumps("\u00fc \udcfc", ensure_ascii=False))
    assert json.loads((tmp_path / "page.json").read_text(encoding="utf-8")) == "\u00fc \udcfc"
