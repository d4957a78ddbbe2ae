"""Configuration files that are torn or hold something else: a sentence with the file and the line, whoever reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from cytossl_monai.cli import bundle
from cytossl_monai.cli.main import main
from cytossl_monai.engines.bundle import read_config_file, run_training, training_files
from cytossl_monai.engines.settings.check import check_training
from cytossl_monai.utils.errors import InputError

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "bundles/cytossl_mil/configs/train.json"

DAMAGED = {
    "flow.yaml": (b"epochs: 3\nviews: {a: [1, 2\nx: 3\n", "line 3, column 2: no YAML (expected ',' or ']'"),
    "tab.yaml": (b"epochs: 3\n\tseed: 1\n", "line 2, column 1: no YAML (found character '\\t'"),
    "tag.yaml": (b"epochs: 3\nseed: !!python/object/apply:os.getpid []\n", "line 2, column 7: no YAML (could not"),
    "torn.json": (b'{"epochs": 3,\n "x": [1,', "line 2, column 10: no JSON (Expecting value)"),
    "empty.json": (b"", "line 1, column 1: no JSON (Expecting value)"),
    "empty.yaml": (b"# nothing\n", "holds nothing; it must hold settings"),
    "list.yaml": (b"- epochs\n- 3\n", "holds a list; it must hold settings"),
    "number.yml": (b"3: epochs\n", "3 is no name of a setting"),
    "bytes.yaml": (bytes(range(128, 256)), "cannot be read ("),
    "zeros.json": (b"\0" * 64, "no JSON"),
    "deep.json": (b'{"a":' * 100_000, "cannot be read ("),
    "text.txt": (b"epochs: 3\n", "cannot be read ("),
}


@pytest.fixture(params=DAMAGED)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    (tmp_path / request.param).write_bytes(DAMAGED[request.param][0])
    return tmp_path / request.param, f"configuration {tmp_path / request.param}"


def test_every_reader_names_the_file_and_the_line(damaged: tuple[Path, str]) -> None:
    path, start = damaged
    words = DAMAGED[path.name][1]
    for read in (
        lambda: read_config_file(path),
        lambda: training_files(TRAIN, [path]),
        lambda: check_training([TRAIN, path], {}, "cytossl_mil/train"),
        lambda: run_training([TRAIN, path], {}),
    ):
        with pytest.raises(InputError) as caught:
            read()
        assert str(caught.value).startswith(start)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["configs/study/ablation.yaml", "bundles/cytossl_pretrain/configs/index.json"])
def test_a_file_that_is_cut_anywhere_is_read_or_refused_in_a_sentence(source: str, tmp_path: Path) -> None:
    text = (ROOT / source).read_bytes()
    path = tmp_path / Path(source).name
    for end in np.random.default_rng(0).integers(0, len(text), 40):
        path.write_bytes(text[:end])
        try:
            content = read_config_file(path)
        except InputError as error:
            sentence = str(error)
            if path.suffix == ".json":  # the line, counted by hand
                with pytest.raises(json.JSONDecodeError) as caught:
                    json.loads(text[:end])
                line = text[: caught.value.pos].count(b"\n") + 1
                assert f"{path}, line {line}, column" in sentence
            else:
                assert f"configuration {path}" in sentence
        else:
            assert content == yaml.safe_load(text[:end])


def test_the_command_line_says_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = tmp_path / "torn.yaml"
    torn.write_bytes(DAMAGED["flow.yaml"][0])
    sentence = f"configuration {torn}, line 3, column 2: no YAML"
    assert main(["pretrain", "--index_dir", "i", "--overlay", str(torn)]) == 2
    assert f"error: {sentence}" in capsys.readouterr().err
    monkeypatch.setattr(bundle, "plain_errors", lambda: None)  # it sets a hook for the whole process
    (tmp_path / "args.json").write_text(json.dumps({"config_file": [str(TRAIN), str(torn)]}))
    for words in (
        ["--config_file", str([str(TRAIN), str(torn)])],
        [f"--config_file={torn}"],
        ["--config-file", f"{TRAIN},{torn}", "--epochs", "3"],
        ["--args_file", str(tmp_path / "args.json")],
    ):
        monkeypatch.setattr(sys, "argv", ["bundle", "run", *words])
        with pytest.raises(InputError) as caught:
            bundle.main()
        assert str(caught.value).startswith(sentence)
