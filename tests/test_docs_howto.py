"""The code of the how-to pages runs as it stands there: all blocks of a page, one after the other."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest
import yaml
from monai.bundle import ConfigParser

from cytossl_monai.data.synthetic.slides import make_slides

REPO_ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((REPO_ROOT / "docs" / "howto").glob("*.md"))
BUNDLE_OPTIONS = {
    "config_file",
    "meta_file",
    "logging_file",
    "bundle_root",
    "run_id",
    "init_id",
    "final_id",
    "tracking",
}
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


def bundle_commands(text: str) -> list[list[str]]:
    """The commands of a page's bash blocks that run a bundle or a script, as words."""
    commands = []
    variables = dict(re.findall(r"^(?:export )?(\w+)=([^\s$]+)$", text, re.MULTILINE))
    text = Template(text).safe_substitute(variables)
    for found in BLOCK.finditer(text):
        if found["info"].split()[:1] == ["bash"]:
            lines = found["code"].replace("\\\n", " ").splitlines()
            words = [shlex.split(line, comments=True) for line in lines]
            commands += [w for w in words if "monai.bundle" in w or any(x.startswith("scripts/") for x in w)]
    return commands


def own_overlays(text: str) -> dict[str, object]:
    """What the page itself has its reader write into an overlay: the keys of its yaml blocks."""
    blocks = [found["code"] for found in BLOCK.finditer(text) if found["info"].split()[:1] == ["yaml"]]
    return {key: value for block in blocks for key, value in (yaml.safe_load(block) or {}).items()}


def named_configs(value: str, own: bool) -> list[Path]:
    """The files that ``--config_file`` names: a path, or a list of paths as the bundle's command line takes it.

    A name without a folder may be the page's ``own`` overlay.
    """
    names = ast.literal_eval(value) if value.startswith("[") else [value]
    found = []
    for name in names:
        path = REPO_ROOT / name
        matches = [path] if path.is_file() else sorted(REPO_ROOT.glob(f"bundles/*/configs/{name}"))
        matches = matches or sorted(REPO_ROOT.glob(f"configs/**/{name}"))
        assert matches or (own and "/" not in name), f"{name} is no config of this project"
        found += matches[:1]
    return found


def lay_out_a_lab(folder: Path) -> None:
    """What the page on inference takes for granted: the checkout, a scan, an encoder and a classifier."""
    toy = importlib.import_module("inference_toy")
    (folder / "bundles").symlink_to(Path(__file__).resolve().parents[1] / "bundles")
    slide = make_slides(folder / "made", 1, 1024, seed=1, density=900.0, blur=0.0, progress=False).parent
    (slide / "slide_0000.tif").rename(folder / "scan.svs")
    toy.make_classifier(folder / "classifier.pt", toy.make_encoder(folder / "encoder.pt"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_name_what_there_is(page: Path) -> None:
    """Bundles take unknown keys silently, so a page with a stale one would look as if it worked."""
    text = page.read_text(encoding="utf-8")
    own = own_overlays(text)
    for words in bundle_commands(text):
        for word in words:
            if word.startswith("scripts/"):
                assert (REPO_ROOT / word).is_file(), f"{word} of {page.name} is not there"
        if "--config_file" not in words:
            continue
        configs = named_configs(words[words.index("--config_file") + 1], bool(own))
        keys = {key for path in configs for key in ConfigParser.load_config_file(path)} | own.keys()
        for word in words[words.index("--config_file") :]:
            if word.startswith("--") and word[2:] not in BUNDLE_OPTIONS:
                key = re.split(r"#|::|=", word[2:])[0]
                assert key in keys, f"{page.name} sets {key}, which {[p.name for p in configs]} do not have"


def test_commands_are_found_and_stale_ones_caught(tmp_path: Path) -> None:
    config = "bundles/cytossl_pretrain/configs/index.json"
    page = tmp_path / "page.md"
    command = f"```bash\npip install x\npython -m monai.bundle run --config_file {config} \\\n    --KEY 1  # why\n```\n"
    page.write_text(command.replace("KEY", "num_workers"))
    assert len(bundle_commands(page.read_text())) == 1
    test_commands_name_what_there_is(page)
    page.write_text(command.replace("KEY", "no_such_key"))
    with pytest.raises(AssertionError, match="no_such_key"):
        test_commands_name_what_there_is(page)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page.read_text(encoding="utf-8"))], ids=lambda page: page.stem
)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    if NOT_RUN in text:
        pytest.skip("the page says that it is not run")
    if page.stem == "inference":
        lay_out_a_lab(tmp_path)
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
