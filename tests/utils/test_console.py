"""Log lines on the terminal: one style for the three bundles, above the progress bars."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cytossl_monai.data.bags.features import write_features

ROOT = Path(__file__).parents[2]
BUNDLES = ["cytossl_pretrain", "cytossl_mil", "cytossl_inference"]

CODE = """
import logging, logging.config, sys, time
from tqdm import tqdm
from monai.bundle import ConfigWorkflow
from cytossl_monai.utils.console import write_above_bars
open(sys.argv[2], "w").write("{}")
ConfigWorkflow(sys.argv[2], logging_file=sys.argv[1], workflow_type="infer")  # MONAI reads the file, in its strict way
write_above_bars()
for number in tqdm(range(3), desc="work", mininterval=0):
    logging.getLogger("cytossl_monai.engines").info("half way %d", number)
    logging.getLogger("SSLTrainer").info("Got new best metric of train_loss")
    logging.getLogger("ignite").warning("careful")
"""


@pytest.mark.parametrize("bundle", BUNDLES[:1])  # the three are one text, see below
def test_lines_are_whole_and_few(bundle: str, tmp_path: Path) -> None:
    conf = ROOT / "bundles" / bundle / "configs" / "logging.conf"
    out = subprocess.run(
        [sys.executable, "-c", CODE, str(conf), str(tmp_path / "empty.json")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "Got new best metric" not in out.stderr
    lines = re.split(r"[\r\n]+", out.stderr)
    for text, level in (("half way 1", "INFO"), ("careful", "WARNING")):
        said = [line for line in lines if text in line]
        assert said, text
        assert all(re.fullmatch(rf"\d\d:\d\d:\d\d  {level}  {text}", line.strip()) for line in said), said


def test_the_three_bundles_speak_alike() -> None:
    assert len({(ROOT / "bundles" / name / "configs" / "logging.conf").read_text() for name in BUNDLES}) == 1


STEP = """
import sys
sys.argv = ["bundle", "run", *sys.argv[1:]]
from cytossl_monai.cli.bundle import main
main()
"""


def test_a_step_says_little_and_logs_the_rest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["slide_id,path,label"]
    for i in range(6):
        attrs = {"encoder": "abc", "encoder_name": "toy"}
        values = rng.standard_normal((6, 8)).astype(np.float32) + i % 2
        write_features(tmp_path / "features" / f"s{i}.h5", values, rng.integers(0, 99, (6, 2)), attrs)
        lines.append(f"s{i},s{i}.svs,{('negative', 'positive')[i % 2]}")
    (tmp_path / "slides.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    train = ROOT / "bundles" / "cytossl_mil" / "configs" / "train.json"
    settings = {"config_file": [str(train), str(ROOT / "configs" / "mil" / "mean.yaml")], "output_dir": out}
    settings |= {"slides": tmp_path / "slides.csv", "features_dir": tmp_path / "features"}
    settings |= {"epochs": 4, "min_epochs": 1, "n_folds": 3}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", STEP, *words], capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in re.split(r"[\r\n]+", done.stdout + done.stderr) if line.strip()]
    assert f"cytossl_mil/train -> {out} (details: run.log)" in said
    own = [line for line in said if "Warning" not in line and not line.startswith("  ")]  # of libraries, with -W always
    assert len(own) <= 6, own
    unwanted = ("not writable", "requires_grad", "input summary", "INFO", "Not all config files")
    assert not any(word in line for line in said for word in unwanted)
    log = (out / "run.log").read_text(encoding="utf-8")
    assert log.count("validation loss") == 4  # one an epoch
    assert "best epoch" in log
    assert "Got new best metric" in log  # of Ignite and MONAI as well
    assert "--epochs" in log  # what was asked for
