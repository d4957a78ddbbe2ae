"""What a report says of an error."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cytossl_monai.utils.errors import SlideError, failure


def test_wrong_input_is_told_in_its_own_words() -> None:
    assert failure(SlideError("a.svs: states no resolution; give mpp")) == "a.svs: states no resolution; give mpp"


def test_errors_of_the_system_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        (tmp_path / "gone.svs").open()
    assert failure(caught.value) == f"No such file or directory: {tmp_path / 'gone.svs'}"
    assert failure(OSError("disk on fire")) == "disk on fire"


def test_what_nobody_expected_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        told = failure(KeyError("x"))
    assert told.startswith("KeyError: 'x'")
    assert "log" in told
    assert "unexpected error" in caplog.text
