"""Exported programs with code of their own are refused before a line of it runs; sound ones are read."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cytossl_monai.networks.nets.program_code import _is_arithmetic, refuse_code
from cytossl_monai.networks.open import open_encoder
from cytossl_monai.utils.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")


class Small(nn.Module):
    """Weights, a buffer and a constant; takes images of any number and height."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 3)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 4)."""
        return self.patches(x).mean((2, 3)) * self.scale + torch.tensor([1.0] * 4)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "sound.pt2"
    axes = {"x": {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO}}
    program = torch.export.export(Small().eval(), (torch.rand(2, 3, 32, 32),), dynamic_shapes=axes)
    torch.export.save(program, path, extra_files={"about.txt": "(whatever = this)\nsays"})
    return path


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rewrite(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy with other members; their names are those within the archive's folder."""
    with zipfile.ZipFile(source) as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"sound/{name}", content)
    return target


def in_json(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        value = json.loads(members[name])
        members[name] = json.dumps(change(value) or value).encode()

    return apply


def evil(kind: str, mark: Path) -> Callable[[dict[str, bytes]], None]:
    """Changes of an archive's members that make ``mark`` where torch loads it."""
    code = f"__import__('pathlib').Path('{mark}').touch()"
    pickled = saved((Touch(mark),))

    def marked(folder: str, path_name: str | None = None) -> Callable[[dict[str, bytes]], None]:
        def apply(members: dict[str, bytes]) -> None:
            name = f"data/{folder}/model_{folder}_config.json"
            config = json.loads(members[name])
            payload = next(iter(config["config"].values()))
            payload["path_name"] = path_name or payload["path_name"]
            payload["use_pickle"] = path_name is None
            members[name] = json.dumps(config).encode()
            # What follows a pickle's end is passed over; torch wants whole numbers of four bytes.
            loose = pickle.dumps(Touch(mark))
            padded = loose + bytes(-len(loose) % 4)
            members[f"data/{folder}/{payload['path_name']}"] = padded if path_name else pickled

        return apply

    def renamed(program: Any) -> Any:
        name = f"x={code}"
        text = json.dumps(program).replace('"name": "x"', f'"name": "{name}"').replace('"x":', f'"{name}":')
        return json.loads(text)

    def sized(program: Any) -> None:
        program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = code

    changes: dict[str, Callable[[dict[str, bytes]], Any]] = {
        "sample inputs": lambda members: members.update({"data/sample_inputs/model.pt": pickled}),
        "legacy weights": lambda members: members.update({"data/weights/model.pt": pickled}),
        "legacy constants": lambda members: members.update({"data/constants/model.pt": pickled}),
        "pickled weights": marked("weights"),
        "pickled constants": marked("constants"),
        "opaque object": marked("constants", "opaque_obj_0"),
        "custom object": marked("constants", "custom_obj_0"),
        "guard": in_json("models/model.json", lambda program: program.update(guards_code=[f"{code} is None"])),
        "size": in_json("models/model.json", sized),
        "name": in_json("models/model.json", renamed),
        "library": lambda members: members.update({"data/aotinductor/model/model.wrapper.so": b"\x7fELF"}),
    }
    return changes[kind]


RUN_BY_TORCH = [
    "sample inputs",
    "legacy weights",
    "legacy constants",
    "pickled weights",
    "pickled constants",
    "opaque object",
    "guard",
    "size",
    "name",
]


@pytest.mark.parametrize("kind", [*RUN_BY_TORCH, "custom object", "library"])
def test_code_in_an_exported_program_is_not_run(sound: Path, tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    path = rewrite(sound, tmp_path / "evil.pt2", evil(kind, mark))
    with pytest.raises(CheckpointError, match=r"evil\.pt2: holds more than a program of torch's operators"):
        open_encoder(path)
    assert not mark.exists()


def test_the_attacks_are_real(sound: Path, tmp_path: Path) -> None:
    """Torch alone runs what is in these files; which of them depends on its version."""
    ran = set()
    for kind in RUN_BY_TORCH:
        path = rewrite(sound, tmp_path / "evil.pt2", evil(kind, tmp_path / kind))
        with contextlib.suppress(Exception):  # it may fail as it likes once the code has run
            torch.export.load(path).module()(torch.rand(2, 3, 32, 32))
        if (tmp_path / kind).exists():
            ran.add(kind)
    assert {"sample inputs", "size"} <= ran, ran
    if torch.__version__.startswith("2.13."):
        assert ran == set(RUN_BY_TORCH)


@pytest.mark.parametrize("spoiled", [None, "state_dict.pt", "state_dict.json", "constants.pt", "example_inputs.pt"])
def test_the_layout_of_torch_2_6(sound: Path, tmp_path: Path, spoiled: str | None) -> None:
    mark, path = tmp_path / "mark", tmp_path / "old.pt2"
    with zipfile.ZipFile(sound) as archive:
        program = archive.read("sound/models/model.json")
    state, constants = Small().state_dict(), {"lifted_tensor_0": torch.ones(4)}
    members = {
        "version": b"8.8",
        "serialized_exported_program.json": program,
        "serialized_state_dict.pt": saved(dict(state)),
        "serialized_constants.pt": saved(constants),
        "serialized_example_inputs.pt": saved(((torch.rand(2, 3, 32, 32),), {})),
    }
    if spoiled:
        members.pop(f"serialized_{spoiled.replace('.json', '.pt')}")
        members[f"serialized_{spoiled}"] = saved((Touch(mark),))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    if spoiled is None:
        refuse_code(path)
        return
    with pytest.raises(CheckpointError, match=rf"old\.pt2: holds more .*serialized_{spoiled}"):
        open_encoder(path)
    assert not mark.exists()


def test_two_members_of_one_name_are_refused(sound: Path, tmp_path: Path) -> None:
    """The two readers of zip files, Python's and torch's, may take another of them, and torch's passes over case."""

    def twice(members: dict[str, bytes]) -> None:
        members["data/sample_inputs/MODEL.pt"] = members["data/sample_inputs/model.pt"]

    with pytest.raises(CheckpointError, match="two members of one name"):
        open_encoder(rewrite(sound, tmp_path / "twice.pt2", twice))


def test_sound_programs_are_read(sound: Path, tmp_path: Path) -> None:
    encoder, _ = open_encoder(sound)
    assert encoder(torch.rand(3, 3, 40, 32)).shape == (3, 4)
    copy = rewrite(sound, tmp_path / "copy.pt2", lambda members: None)
    assert open_encoder(copy)[0](torch.rand(3, 3, 40, 32)).shape == (3, 4)
    (tmp_path / "empty.pt2").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"empty\.pt2: cannot be read as exported"):
        open_encoder(tmp_path / "empty.pt2")


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "Max(1, s0 - 2)",
        "Mul(Integer(192), Symbol('s53', positive=True, integer=True))",
        "(s0//2)**2",
        "Mod(s0, 2)",
        "TruncToInt(Mul(Float('0.5', precision=53), ToFloat(Symbol('s5', positive=True, integer=True))))",
    ],
)
def test_sizes_are_arithmetic(text: str) -> None:
    assert _is_arithmetic(text, of_tensors=False)
    assert _is_arithmetic(text, of_tensors=True)


def test_guards_are_arithmetic_of_sizes() -> None:
    for text in (
        "L['x'].size()[2] >= 3",
        "((-2) + L['x'].size()[2]) != 1",
        "math.trunc(torch.sym_float(L['x'].shape[0]) / 2) == 1 and not L['x'].stride()[0] == 1",
    ):
        assert _is_arithmetic(text, of_tensors=True)
        assert not _is_arithmetic(text, of_tensors=False)


@pytest.mark.parametrize(
    "text",
    [
        "eval('x')",
        "exec('x')",
        "open('x', w)",
        "S('x')",
        "N('x')",
        "Max('a(b)', 1)",
        "(lambda: 1)()",
        "[x for x in y]",
        "__import__('os')",
        "x.__class__",
        "torch.hub",
        "torch.load('x')",
        "f'{x}'",
        "(a := 1)",
        "1\nimport os",
        "x()()",
        "L['x']()",
        "getattr(x, 'y')",
        "Max.__mro__",
        "breakpoint()",
        "math.__loader__",
        "a = 1",
        "",
    ],
)
def test_what_is_more_than_arithmetic_is_told(text: str) -> None:
    assert not _is_arithmetic(text, of_tensors=True)
    assert not _is_arithmetic(text, of_tensors=False)
