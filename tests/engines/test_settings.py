"""Each configuration ends with a sentence where a setting is unknown or wrong, and takes what is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow, create_workflow

from cytossl_monai.engines.settings.check import check_training
from cytossl_monai.engines.settings.kinds import Count, Items, Number, PathText, Switch
from cytossl_monai.engines.settings.references import ABSENT, part
from cytossl_monai.engines.settings.tables import TABLES
from cytossl_monai.utils.errors import InputError, SettingError
from cytossl_monai.utils.program import plain_cause

ROOT = Path(__file__).parents[2]
PRETRAIN, MIL, INFERENCE = (
    ROOT / "bundles" / f"cytossl_{name}" / "configs" for name in ("pretrain", "mil", "inference")
)
LAID_OVER = {"evaluate": "train", "multi_gpu_train": "train"}
CONFIGS = sorted(
    path.relative_to(ROOT / "bundles")
    for path in (ROOT / "bundles").glob("*/configs/*.json")
    if path.stem not in ("metadata", "inspect")
)
OVERLAYS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with what the defaults name; no words of pytest's command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    (tmp_path / "slides.csv").write_text("slide_id,path\na,b\n")
    for name in ("features", "inference"):
        (tmp_path / name).mkdir()


def begin(files: list[Path], **overrides: Any) -> ConfigWorkflow:
    """The first step of a configuration, as ``monai.bundle run`` takes it."""
    paths = [str(path) for path in files]
    workflow = ConfigWorkflow(paths, workflow_type=None, logging_file=False, **overrides)
    workflow.parser["initialize"] = workflow.parser["initialize"][:1]
    workflow.initialize()
    return workflow


def refusal(files: list[Path], **overrides: Any) -> str:
    with pytest.raises((RuntimeError, InputError)) as caught:
        begin(files, **overrides)
    cause = plain_cause(caught.value)
    assert isinstance(cause, InputError)
    return str(cause)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_takes_its_own_defaults(config: Path) -> None:
    base = ROOT / "bundles" / config.parent / f"{LAID_OVER.get(config.stem, config.stem)}.json"
    files = [base, ROOT / "bundles" / config] if config.stem in LAID_OVER else [base]
    workflow = begin(files)
    first = workflow.parser["initialize"][0]
    assert first["_target_"] == "cytossl_monai.engines.check_settings"
    assert (first["bundle"], f"{first['config']}.json") == (config.parts[0], base.name)


def test_every_overlay_is_known() -> None:
    for overlay in OVERLAYS:
        if overlay.parts[1] in ("ssl", "backbone", "data", "scale"):
            begin([PRETRAIN / "train.json", ROOT / overlay])
        elif overlay.parts[1] == "mil":
            begin([MIL / "train.json", ROOT / overlay])


def test_every_plain_setting_is_declared() -> None:
    missing = []
    for config in CONFIGS:
        if config.stem in LAID_OVER:
            continue
        content = json.loads((ROOT / "bundles" / config).read_text(encoding="utf-8"))
        table = TABLES[f"{config.parts[0]}/{config.stem}"]
        for key, value in content.items():
            is_plain = not isinstance(value, (dict, list)) and not str(value).startswith(("@", "$@items", "$@network"))
            if is_plain and not key.startswith("_") and key not in table and "classifier" not in str(value):
                missing.append(f"{config}: {key}")
    assert not [
        name
        for name in missing
        if not name.endswith((": lr", ": class_names", ": in_features", ": postprocessing", ": network_def"))
    ], missing


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"step": 100}, "unknown setting step (100): did you mean steps?"),
        ({"tile_sise": 96}, "did you mean tile_size?"),
        ({"views#global_sise": 96}, "did you mean global_size?"),
        ({"train#trainer#max_step": 3}, "did you mean max_steps?"),
        ({"train#handler": []}, "did you mean handlers?"),
        ({"bakcbone": {"_target_": "cytossl_monai.networks.sr_vit_tiny"}}, "did you mean backbone?"),
        (
            {"backbone": {"_target_": "cytossl_monai.networks.sr_vit_tinny"}},
            "there is no cytossl_monai.networks.sr_vit_tin",
        ),
        ({"steps": -1}, "steps must be a whole number, at least 1; it is -1"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"batch_size": 10**6}, "batch_size must be a whole number, at least 1, at most 65536"),
        ({"tile_size": 1e9}, "tile_size must be a whole number, at least 16, at most 8192"),
        ({"base_lr": float("nan")}, "base_lr must be a number, above 0"),
        ({"base_lr": "fast"}, "base_lr must be a number"),
        ({"device": "tpu9"}, "device must be a device such as cpu"),
        ({"optimizer_name": "adamm"}, "optimizer_name must be one of adam, adamw, lars, sgd"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
        ({"epochs": None}, "epochs must be a value, not null"),
        ({"betas": [0.9]}, "betas must be a list of 2"),
        ({"output_dir": "slides.csv"}, "cannot write to slides.csv"),
        ({"output_dir": "slides.csv/below"}, "slides.csv is a file"),
        ({"steps": "$1/0"}, "steps cannot be worked out: ZeroDivisionError"),
        (
            {"backbone": None},
            "backbone must be a component with a _target_; it is None. Leave it out for cytossl_monai",
        ),
        ({"views": {"global_size": 96}}, "views must be a component with a _target_; it is {'global_size': 96}"),
        ({"train#dataset": "index"}, "train#dataset must be a component with a _target_; it is 'index'"),
        ({"steps": "$-5"}, "steps must be a whole number"),
        ({"betas": [0.9, 1.0]}, "betas must be a list of which each is a number, at least 0, at most 0.99999"),
        ({"freeze_last_layer": 1}, "freeze_last_layer must be a number, at least 0, at most 0.999"),  # epochs elsewhere
        ({"temperature_warmup": 30}, "temperature_warmup must be a number, at least 0, at most 1"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], words: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert words in refusal([PRETRAIN / "train.json"], **wrong)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_overlay_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base_lr: 1e-3\nwarmup_epoch: 2\n")
    assert "did you mean warmup_epochs?" in refusal([PRETRAIN / "train.json", tmp_path / "mine.yaml"])
    (tmp_path / "mine.yaml").write_text("base_lr: 1e-3\nmy_own: 4\nsteps: '$@my_own * 2'\n")
    parser = begin([PRETRAIN / "train.json", tmp_path / "mine.yaml"]).parser
    assert parser.get_parsed_content("base_lr") == 1e-3
    assert parser.get_parsed_content("steps") == 8


@pytest.mark.parametrize("overlay", ["images", "mixed"])
def test_nuclei_of_a_detector_are_not_passed_over_in_silence(overlay: str) -> None:
    files = [PRETRAIN / "train.json", ROOT / f"configs/data/{overlay}.yaml"]
    said = refusal(files, nuclei_source="detections")
    assert said.startswith("setting nuclei_source has no effect: it is for train.json on indexed slides")
    begin(files, nuclei_source=None)
    begin(files[:1], nuclei_source="detections")


def test_a_setting_that_nothing_reads_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An overlay has replaced what would read it; what stands in a file and not on the command line may be idle."""
    monkeypatch.setattr(sys, "argv", ["run", "--tile_size", "64", "--image_size=96", "--steps", "3", "--window", "4"])
    given = {"tile_size": 64, "image_size": 96, "steps": 3, "window": 4, "prototypes": 16}
    begin([PRETRAIN / "train.json", ROOT / "configs/data/images.yaml", ROOT / "configs/ssl/simclr.yaml"], **given)
    said = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert said == ["setting tile_size has no effect: nothing that runs reads it"]


def test_epochs_beside_steps_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The recipe for a small machine counts steps, so that ``--epochs 5`` trained 600 of them."""
    monkeypatch.setattr(sys, "argv", ["run", "--epochs", "5"])
    begin([PRETRAIN / "train.json", ROOT / "configs/scale/cpu.yaml"], epochs=5)
    assert "setting epochs has no effect: steps is 600; give --steps null to count epochs" in caplog.text
    caplog.clear()
    begin([PRETRAIN / "train.json"], epochs=5)
    begin([PRETRAIN / "train.json", ROOT / "configs/scale/cpu.yaml"], epochs=5, steps=None)
    assert "no effect" not in caplog.text


def test_an_overlay_over_another_may_leave_its_keys_unused(tmp_path: Path) -> None:
    """The small machine's recipe has keys of its transformer; a ResNet or EfficientNet laid over it replaces that."""
    overlays = [ROOT / "configs" / name for name in ("scale/cpu.yaml", "backbone/efficientnet_lite0.yaml")]
    check_training([PRETRAIN / "train.json", *overlays], {}, "cytossl_pretrain/train")
    files = [str(path) for path in (PRETRAIN / "train.json", *overlays)]
    create_workflow(config_file=files, logging_file=False, workflow_type="train", output_dir=str(tmp_path / "run"))
    with pytest.raises((RuntimeError, InputError)) as caught:
        create_workflow(config_file=files, logging_file=False, workflow_type="train", num_layer=4)
    assert "unknown setting num_layer (4): did you mean num_layers?" in str(plain_cause(caught.value))


@pytest.mark.parametrize(
    ("key", "given", "taken"),
    [
        ("steps", "1e0", 1),
        ("batch_size", 4.0, 4),
        ("base_lr", "1e-3", 1e-3),
        ("resume", "false", False),
        ("output_dir", 20240115, "20240115"),
        ("output_dir", "run #1", "run #1"),
        ("labels", "None", None),
    ],
)
def test_what_was_meant_is_taken(key: str, given: Any, taken: Any) -> None:
    parser = begin([PRETRAIN / "train.json"], **{key: given}).parser
    assert parser.get_parsed_content(key) == taken
    assert type(parser.get_parsed_content(key)) is type(taken)
    if key == "output_dir":
        assert parser.get_parsed_content("log_path") == f"{taken}/log.csv"


@pytest.mark.parametrize("typed", ["2024", "1e3", "run #1", "x, y"])
@pytest.mark.parametrize("form", ["--output_dir {}", "--output_dir={}", "--output-dir {}"])
def test_paths_stay_as_typed(typed: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Python Fire itself, which makes a number, a truth or a tuple of them."""
    import fire

    words = form.split(" ") if " " in form.replace("{}", "") else [form]
    words = [word.format(typed) for word in words]
    monkeypatch.setattr(sys, "argv", ["run", *words])
    given = fire.Fire(lambda output_dir: {"value": output_dir}, command=[*words, "value"])
    assert begin([PRETRAIN / "train.json"], output_dir=given).parser.get_parsed_content("output_dir") == typed


@pytest.mark.parametrize("config", [PRETRAIN / "train.json", PRETRAIN / "inference.json", *INFERENCE.glob("*e*.json")])
def test_a_device_may_be_named_in_plain_text(config: Path) -> None:
    """As a command line gives it: --device cpu. What is worked out from it is checked too."""
    if "device" in json.loads(config.read_text()):
        begin([config], device="cpu")


def test_one_is_a_list_of_one() -> None:
    parser = begin([INFERENCE / "inference.json"], evidence="report", negative_class=0).parser
    assert parser.get_parsed_content("evidence") == ["report"]
    assert parser.get_parsed_content("negative_class") == "0"
    assert "each is one of tiles" in refusal([INFERENCE / "inference.json"], evidence="reprot")
    overlay = str(ROOT / "configs" / "mil" / "mean.yaml")
    assert begin([MIL / "cross_validate.json"], overlays=overlay).parser.get_parsed_content("overlays") == [overlay]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"epoch": 2}, "did you mean epochs?"),
        ({"epochs": -2}, "epochs must be a whole number, at least 1"),
        ({"trian#trainer": 2}, "unknown setting trian#trainer"),
        ({"output_dir": "x"}, "set by the program itself"),
        ({"prevalence": "high"}, "prevalence must be a list"),
        ({"prevalence": [0.5, -1]}, "prevalence must be a list of which each is a number, above 0, at most 1"),
    ],
)
def test_overrides_of_folds_are_checked_before_any_fold(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError) as caught:
        check_training([MIL / "train.json"], overrides, "cytossl_mil/train", ("output_dir",))
    assert words in str(caught.value)
    check_training([MIL / "train.json"], {"epochs": 2, "train#trainer#clip_norm": 2.0}, "cytossl_mil/train")


def test_looking_for_settings_that_are_not_there_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI's ``in`` compares a missing id with all others, letter by letter: that was most of the check's time."""
    files = [PRETRAIN / "train.json", ROOT / "configs/ssl/moco_v3.yaml"]
    parser = begin(files).parser
    ids = [*TABLES["cytossl_pretrain/train"], "train#dataset", "train::handlers::1", "initialize#0#bundle", "views#x#y"]
    for one in [*ids, "train#handlers#99", "betas#0", "seed#0"]:
        value = part(parser.config, one)
        assert (value is not ABSENT) == (one in parser)
        assert value is ABSENT or value is parser[one]

    def compare(*_: str) -> int:
        raise AssertionError("names are compared")

    monkeypatch.setattr("monai.utils.module.damerau_levenshtein_distance", compare)
    check_training(files, {"steps": 3}, "cytossl_pretrain/train")


def test_a_copy_under_another_name_may_have_settings_of_its_own(tmp_path: Path) -> None:
    content = json.loads((PRETRAIN / "train.json").read_text())
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.json").write_text(json.dumps({**content, "note": "unused"}))
    (tmp_path / "configs" / "metadata.json").write_text("{}")
    workflow = begin([tmp_path / "configs" / "train.json"])
    assert workflow.parser.get_parsed_content("bundle_root") == str(tmp_path)  # not the checkout's
    (tmp_path / "configs" / "mine.json").write_text(json.dumps(content))
    begin([tmp_path / "configs" / "mine.json"])
    assert "did you mean steps?" in refusal([tmp_path / "configs" / "mine.json"], step=1)


def test_a_configuration_outside_of_any_bundle_says_whose_files_stand_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its folder's name says nothing, and its neighbours are no bundle: never silently the checkout's."""
    content = json.loads((PRETRAIN / "train.json").read_text())
    renamed = tmp_path / "cytossl_pretrain" / "configs"
    renamed.mkdir(parents=True)
    (renamed / "train.json").write_text(json.dumps(content))
    root = begin([renamed / "train.json"]).parser.get_parsed_content("bundle_root")
    assert root == str(PRETRAIN.parent)
    assert f"the configuration in {renamed} lies in no bundle" in caplog.text
    assert f"those of {root}" in caplog.text
    caplog.clear()
    (renamed / "metadata.json").write_text("{}")
    copy = (tmp_path / "cytossl_pretrain").rename(tmp_path / "mine")
    assert begin([copy / "configs" / "train.json"]).parser.get_parsed_content("bundle_root") == str(copy)
    assert begin([PRETRAIN / "train.json"]).parser.get_parsed_content("bundle_root") == str(PRETRAIN.parent)
    assert "lies in no bundle" not in caplog.text


def test_kinds_refuse_what_is_none_of_them() -> None:
    for kind, values in (
        (Count(), (True, "x", -1, 0.5, float("inf"), [], {})),
        (Number(low=0, high=1), (True, "x", -1, 2, float("nan"), [])),
        (Switch(), ("maybe", 2, [])),
        (PathText(), ("", " ", "a\0b", [], {}, True)),
        (Items(of=Count()), ("x", {"a": 1}, [1, "y"])),
    ):
        for value in values:
            with pytest.raises(ValueError, match=r"."):
                kind.read(value)
    assert Count(high=2**63 - 1).read(2**40) == 2**40


def test_the_program_ends_with_the_sentence_alone(tmp_path: Path) -> None:
    words = ["--config_file", str(PRETRAIN / "index.json"), "--slides", "slides.csv", "--min_nucleii", "5"]
    environment = {key: value for key, value in os.environ.items() if key != "CYTOSSL_TRACEBACK"}
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: unknown setting min_nucleii (5): did you mean min_nuclei?"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "index").exists()
