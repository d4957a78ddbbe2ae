"""Log lines on the terminal: one style for the three bundles, above the progress bars."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
