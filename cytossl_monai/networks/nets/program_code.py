"""What an exported program (``.pt2``) may hold: numbers and operators, and no code of its own."""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from cytossl_monai.utils.errors import CheckpointError

__all__ = ["refuse_code"]

# Every member that `torch.export.save` of torch 2.6 and later writes; what is not named here is refused, AOTInductor's
# compiled libraries and pickled objects of constants among it: `torch.export.load` runs both.
_TEXT = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/[\w.]+|\.\w+|extra/.*|extra_files/.*", re.S
)
_NUMBERS = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_CONFIG = re.compile(r"data/(weights|constants)/[\w.-]+\.json")
_PICKLE = re.compile(
    r"data/(weights|constants|sample_inputs)/[\w.-]+\.pt|serialized_(state_dict|constants)\.(pt|json)|"
    r"serialized_example_inputs\.pt"
)
_PROGRAM = re.compile(r"models/[\w.-]+\.json|serialized_exported_program\.json")

# Names in a program become Python source that torch runs, so they must be names.
_NAME = re.compile(r"[\w.:#+/-]*")
_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+(e[+-]?[0-9]+)?")
# Written into quotes; ", ( and = are harmless there, what ends the quotes is not.
_QUOTED = re.compile(r"[^'\"\\\n\r]*")
_TOLD = {"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom"}
"""Where an operator came from: read by people, never by Python."""
_NESTED = {"in_spec", "out_spec", "context"}
"""JSON within JSON."""
_IMPORTS = {"default_factory_module", "__enum__"}
"""Ask torch to import a module that the file names."""

_FUNCTIONS = {"floor", "ceiling", "sqrt", "min", "max", "abs", "int", "float", "bool"}
_OF_TENSORS = {"size", "stride", "storage_offset", "shape", "dim", "ndim", "is_integer", "numel"}
_GRAMMAR = (
    ast.Expression, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.IfExp, ast.Name, ast.Constant, ast.Call,
    ast.keyword, ast.Tuple, ast.List, ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def refuse_code(path: Path) -> None:
    """Go through an exported program before torch opens it.

    `torch.export.load` unpickles what the file says is pickled, loads compiled libraries, evaluates the expressions of
    sizes and runs the guards and the names of the graph as Python. Here each is held to what exported programs need.

    Args:
        path: the archive, of this torch's layout or of 2.6's.

    Raises:
        CheckpointError: where a part could run code, or is not known to be free of it.
    """
    with zipfile.ZipFile(path) as archive:
        found = archive.namelist()
        if len({name.casefold() for name in found}) < len(found):
            raise _refusal(path, "two members of one name")
        members = dict(zip(map(_within(found), found), found))
        if not any(_PROGRAM.fullmatch(name) for name in members):
            raise CheckpointError(f"{path}: holds no exported program. Save it by torch.export.save.")
        read = {}
        for name, member in members.items():
            if _TEXT.fullmatch(name) or _NUMBERS.fullmatch(name):
                continue
            read[name] = archive.read(member)
            if _PICKLE.fullmatch(name):
                _check_pickle(path, name, read[name])
            elif _CONFIG.fullmatch(name):
                _check_config(path, name, json.loads(read[name]))
            elif _PROGRAM.fullmatch(name):
                _check_program(path, name, json.loads(read[name]), "")
            else:
                raise _refusal(path, name)
    _check_second_reader(path, sorted(members), read)


def _within(found: list[str]) -> Any:
    """Torch's archives lie in one folder, whose name is of no matter; those of torch 2.6 in none."""
    roots = {name.split("/", 1)[0] for name in found}
    if len(roots) == 1 and all("/" in name for name in found):
        return lambda name: name.split("/", 1)[1]
    return lambda name: name


def _check_second_reader(path: Path, names: list[str], read: dict[str, bytes]) -> None:
    """Torch has a reader of zip files of its own: what it sees must be what was judged."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        records = sorted(reader.get_all_records())
    except RuntimeError:
        return  # then `torch.export.load` reads it by zipfile, or not at all
    if names != records:
        raise _refusal(path, "members that its two tables of contents do not share")
    for name, content in read.items():
        if reader.get_record(name) != content:
            raise _refusal(path, name)


def _check_pickle(path: Path, name: str, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _refusal(path, name) from error


def _check_config(path: Path, name: str, config: Any) -> None:
    folder = name.rsplit("/", 1)[0]
    for payload in config["config"].values():
        if payload.get("use_pickle", False) is not False or not _NUMBERS.fullmatch(f"{folder}/{payload['path_name']}"):
            raise _refusal(path, name)


def _check_program(path: Path, name: str, value: Any, key: str) -> None:
    """Every text of a program's JSON, by what torch makes of it."""
    if isinstance(value, dict):
        for inner, content in value.items():
            if inner in _IMPORTS or not _NAME.fullmatch(inner):
                raise _refusal(path, f"{name}, {inner[:80]!r}")
            _check_program(path, name, content, inner)
    elif isinstance(value, list):
        for content in value:
            _check_program(path, name, content, key)
    elif isinstance(value, str) and not _is_harmless(path, name, value, key):
        raise _refusal(path, f"{name}, {key} {value[:80]!r}")


def _is_harmless(path: Path, name: str, text: str, key: str) -> bool:
    if key in _TOLD:
        return True
    if key == "expr_str":
        return _is_arithmetic(text, of_tensors=False)
    if key == "guards_code":
        return _is_arithmetic(text, of_tensors=True)
    if key in ("as_string", "as_strings"):
        return _QUOTED.fullmatch(text) is not None
    if key in _NESTED:
        try:
            inner = json.loads(text)
        except ValueError:
            return _NAME.fullmatch(text) is not None
        if isinstance(inner, str):
            return _NAME.fullmatch(inner) is not None
        _check_program(path, name, inner, "context")
        return True
    return _NAME.fullmatch(text) is not None


def _is_arithmetic(text: str, of_tensors: bool) -> bool:
    """Whether a text only computes: with sizes, and in guards with those of the inputs, ``L['x'].size()[0]``."""
    if "\n" in text or "\r" in text:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return False
    return all(_is_harmless_node(node, of_tensors) for node in ast.walk(tree))


def _is_harmless_node(node: ast.AST, of_tensors: bool) -> bool:
    if isinstance(node, ast.Name):
        return not node.id.startswith("__")
    if isinstance(node, ast.Constant):
        # sympy evaluates texts that it is given, so they too must be names, or numbers.
        return not isinstance(node.value, str | bytes) or (
            isinstance(node.value, str) and (node.value.isidentifier() or _NUMBER.fullmatch(node.value) is not None)
        )
    if isinstance(node, ast.Attribute):
        module = node.value.id if isinstance(node.value, ast.Name) else ""
        allowed = node.attr in _OF_TENSORS or (module == "math" and not node.attr.startswith("_"))
        return of_tensors and (allowed or (module == "torch" and node.attr.startswith("sym_")))
    if isinstance(node, ast.Subscript | ast.Slice):
        return of_tensors
    if isinstance(node, ast.Call):
        function = node.func
        # Capitals are sympy's classes; Python's builtins that do something are small. S and N evaluate texts.
        return (
            (isinstance(function, ast.Attribute) and of_tensors)
            or (isinstance(function, ast.Name) and function.id in _FUNCTIONS)
            or (isinstance(function, ast.Name) and len(function.id) > 1 and function.id[0].isupper())
        )
    return isinstance(node, _GRAMMAR)


def _refusal(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds more than a program of torch's operators ({name}): code of its own might run as it is loaded. "
        "It was not loaded. Export the network again by torch.export.save, with tensors alone as inputs and weights."
    )
