"""The code of the how-to pages runs as it stands there: all blocks of a page, one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).resolve().parents[1] / "docs" / "howto").glob("*.md"))
BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
NOT_RUN = "<!-- not run in the tests -->"  # a page that needs what a test machine has not says so in this way


def python_blocks(text: str) -> list[str]:
    """The python blocks of a page, in order, each moved to its own line so that errors name the page's line."""
    blocks = []
    for found in BLOCK.finditer(text):
        words = found["info"].split()
        if words and words[0] in ("python", "py"):
            blocks.append("\n" * text[: found.start("code")].count("\n") + found["code"])
    return blocks


def test_blocks_are_found_and_told_apart() -> None:
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```\nplain\n```\n```python title='t'\ny = 2\n```\n"
    assert [block.strip() for block in python_blocks(text)] == ["x = 1", "y = 2"]
    assert python_blocks(text)[1].count("\n") == text.split("y = 2")[0].count("\n") + 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if NOT_RUN in text:
        pytest.skip("the page says that it is not run")
    blocks = python_blocks(text)
    if not blocks:
        pytest.skip("no python on this page")
    runner = (
        "import sys, types, pathlib\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_docs_howto import python_blocks\n"
        "page = pathlib.Path(sys.argv[1])\n"
        "names = {'__name__': '__main__'}\n"
        "for block in python_blocks(page.read_text(encoding='utf-8')):\n"
        "    exec(compile(block, str(page), 'exec'), names)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", runner, str(page), str(Path(__file__).parent)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{page.name}:\n{done.stderr[-3000:]}"


def test_the_pages_of_ncp_are_here() -> None:
    assert {"ncp_in_monai", "ncp_in_pytorch", "ncp_beside_other_ssl"} <= {page.stem for page in PAGES}
