"""A plugin of pytest: what failed is shown at once, so that a run that is cut short has told what it found."""

from __future__ import annotations

from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """Print the end of a failure's traceback."""
    if report.failed:
        tail = str(report.longrepr).splitlines()[-12:]
        print("\n".join(["", f"FAILED {report.nodeid} ({report.when})", *tail]), flush=True)
