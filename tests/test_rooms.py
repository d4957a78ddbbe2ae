"""The house: imports run one way, rooms and files stay small, and the public faces are what they say."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cytossl_monai
from cytossl_monai.registry import FACES, short_names

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cytossl_monai"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}

FLOORS = [
    {"utils"},
    {"losses"},
    {"networks"},
    {"methods", "metrics"},
    {"data"},
    {"transforms"},
    {"index", "visualize"},
    {"engines", "inference"},
    {"handlers", "deploy", "cli"},
]
"""A room imports from floors below its own, and from its own."""

LARGEST_ROOM = 12
LARGEST_FILE = 400


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, functions and type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.removeprefix("cytossl_monai.") for name in names if name.startswith("cytossl_monai.")}
    return found & MODULES.keys()


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def floor(module: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if module.split(".")[0] in rooms)


def test_imports_run_one_way():
    upwards = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        if module != "registry"
        for other in others - {"registry"}  # a list of names, which imports no room
        if floor(other) > floor(module)
        or (floor(other) == floor(module) and other.split(".")[0] != module.split(".")[0])
    ]
    assert not upwards, upwards


def test_no_circles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(IMPORTS[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(IMPORTS):
        visit(module, ())


def test_rooms_and_files_are_small():
    rooms = {path.parent for path in MODULES.values()}
    crowded = {
        str(room.relative_to(ROOT)): count
        for room in rooms
        if (count := sum(path.name != "__init__.py" for path in room.glob("*.py"))) > LARGEST_ROOM
    }
    assert not crowded, crowded
    long = {
        str(path.relative_to(ROOT)): count
        for path in MODULES.values()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > LARGEST_FILE
    }
    assert not long, long


@pytest.mark.parametrize("face", FACES)
def test_a_face_is_true(face):
    package = importlib.import_module(f"cytossl_monai.{face}")
    assert sorted(package.__all__) == list(package.__all__)
    for name in package.__all__:
        member = getattr(package, name)
        if inspect.isclass(member) or inspect.isfunction(member):
            assert inspect.getdoc(member), f"{face}.{name} has no docstring"
            assert member.__module__.startswith(f"cytossl_monai.{face}."), f"{face}.{name} is {member.__module__}'s"
            module = sys.modules[member.__module__]
            assert name in module.__all__, f"{member.__module__}.__all__ lacks {name}"


def test_importing_the_package_loads_none_of_its_parts():
    code = "import sys, cytossl_monai; print(*sorted(m for m in sys.modules if m in ('torch', 'monai', 'numpy')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == ""


def test_short_names_are_not_those_of_monai():
    from monai.bundle.config_item import ComponentLocator

    locator = ComponentLocator()
    assert cytossl_monai.__version__
    for name in short_names():
        assert locator.get_component_module_name(name) == "monai_cytossl", name


def written(*suffixes: str) -> list[tuple[str, str]]:
    """(file, dotted name of this package) of everything written in configurations, documents or scripts."""
    folders = ("bundles", "configs", "docs", "scripts", "README.md", "mkdocs.yml")
    files = [p for f in folders for p in ([ROOT / f] if (ROOT / f).is_file() else (ROOT / f).rglob("*"))]
    return [
        (str(path.relative_to(ROOT)), name)
        for path in files
        if path.suffix in suffixes
        for name in re.findall(r"cytossl_monai(?:\.[A-Za-z_]\w*)+", path.read_text(encoding="utf-8"))
    ]


def test_every_name_that_is_written_somewhere_exists():
    for file, name in written(".json", ".yaml", ".yml", ".md", ".py"):
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            try:
                member = importlib.import_module(".".join(parts[:count]))
            except ModuleNotFoundError:
                continue
            for part in parts[count:]:
                assert hasattr(member, part), f"{file}: {name} does not exist"
                member = getattr(member, part)
            break


def test_configurations_use_the_public_face():
    deep = [
        f"{file}: {name}"
        for file, name in written(".json", ".yaml")
        if len(name.split(".")) > 3 and "metadata" not in file
    ]
    assert not deep, deep


def test_what_scripts_import_exists():
    """Benchmarks and studies run seldom: a name that moved away would be found by the next who measures."""
    wrong = []
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cytossl_monai")):
                continue
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError:
                        wrong.append(f"{path.relative_to(ROOT)}: {node.module}.{alias.name}")
    assert not wrong, wrong
