"""The tests marked ``gpu``; a dry run holds that they can be collected, and that they skip without a GPU."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from common import arguments, figure

ROOT = Path(__file__).resolve().parents[3]


def main() -> int:
    args = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        status = subprocess.run([*command, str(ROOT / "tests")], cwd=ROOT, check=False).returncode
        suite = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
    for name, count in counts.items():
        figure(name, count)
    if args.dry:
        return status or int(counts["skipped"] != counts["tests"])
    return status


if __name__ == "__main__":
    sys.exit(main())
