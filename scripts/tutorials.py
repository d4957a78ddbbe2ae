"""Run the notebooks of ``docs/tutorials`` and store them with small outputs, for the site and for readers on GitHub.

    python scripts/tutorials.py                    all of them
    python scripts/tutorials.py reading_attention  one

Pictures are stored as JPEG of at most 900 px; progress bars are left out. ``tests/test_tutorials.py`` runs them too,
and holds what is stored to this.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "tutorials"
WIDEST = 900


def run(path: Path) -> Any:
    """The notebook with its outputs made small, each cell run in order by a kernel of its own in an empty folder."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute()
    return shrink(notebook)


def shrink(notebook: Any) -> Any:
    """Make the outputs small: JPEG pictures, no progress bars, no times of execution, no temporary folder."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "text" in output:  # where a run says that it writes is of no use to who reads it elsewhere
                output["text"] = re.sub(rf"{tempfile.gettempdir()}/\w+/", "", output["text"])
            data = output.get("data", {})
            if "image/png" in data:
                data["image/jpeg"] = _jpeg(base64.b64decode(data.pop("image/png")))
    return notebook


def _jpeg(png: bytes) -> str:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((WIDEST, 4 * WIDEST))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85, optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks without .ipynb; default: all")
    args = parser.parse_args()
    for path in [FOLDER / f"{name}.ipynb" for name in args.names] or sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(run(path), path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
