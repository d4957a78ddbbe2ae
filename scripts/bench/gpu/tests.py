"""The tests marked ``gpu``; a dry run holds that they can be collected, and that they skip without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from common import arguments, figure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def main() -> int:
    args = arguments(__doc__).parse_args()
    # Only files that have such tests: the others want packages that this machine need not have.
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    # Most of their time is the compiler's, on the host.
    side_by_side = [] if args.dry or importlib.util.find_spec("xdist") is None else ["-n", "6"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-p", "at_once", "--tb=short", "--color=no"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
        status = subprocess.run([*command, *side_by_side, *files], cwd=ROOT, check=False, env=environment).returncode
        suite = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
    for name, count in counts.items():
        figure(name, count)
    if args.dry:
        return status or int(counts["skipped"] != counts["tests"])
    return status


if __name__ == "__main__":
    sys.exit(main())
