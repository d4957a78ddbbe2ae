"""The page on the architecture is true: its rooms exist, and its walk-through of a new method runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from cytossl_monai.metrics.logged import read_log
from cytossl_monai.networks.files import load_encoder
from cytossl_monai.networks.nets.encoder import Encoder
from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "concepts" / "architecture.md"


def titled_blocks(text: str) -> dict[str, str]:
    return dict(re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', text, re.DOTALL))


def test_every_path_on_the_page_exists() -> None:
    roots = [ROOT, ROOT / "cytossl_monai", ROOT / "bundles", ROOT / "cytossl_monai" / "inference"]
    written = re.findall(r"`([\w/]+/[\w/.]*|\w+\.(?:py|json))`", PAGE.read_text(encoding="utf-8"))
    assert len(written) > 15
    own = titled_blocks(PAGE.read_text(encoding="utf-8"))
    missing = [path for path in written if path not in own and not any((root / path).exists() for root in roots)]
    assert not missing, missing


def test_the_new_method_of_the_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = titled_blocks(PAGE.read_text(encoding="utf-8"))
    for name, text in blocks.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert {"toy_method.py", "toy_method.yaml"} == blocks.keys()
    monkeypatch.syspath_prepend(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(120, 250, (64, 64, 3), dtype=np.uint8)).save(images / f"{number}.png")
    configs = [
        ROOT / "bundles" / "cytossl_pretrain" / "configs" / "train.json",
        ROOT / "configs" / "data" / "images.yaml",
        tmp_path / "toy_method.yaml",
    ]
    network = sr_vit_tiny(img_size=32, hidden_size=24, mlp_dim=32, num_layers=1, num_heads=3, num_keys=2)
    workflow = ConfigWorkflow(
        [str(path) for path in configs],
        workflow_type="train",
        logging_file=False,
        **{
            "dataset_dir": str(images),
            "output_dir": str(tmp_path / "out"),
            "device": torch.device("cpu"),
            "encoder": Encoder(network),
            "image_size": 64,
            "views#global_size": 32,
            "views#n_local": 0,
            "batch_size": 4,
            "steps": 3,
            "log_every": 1,
            "num_workers": 0,
        },
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    assert {"loss", "spread"} <= {figure for _, _, figure, _ in read_log(tmp_path / "out" / "log.csv")}
    encoder, meta = load_encoder(tmp_path / "out" / "models" / "model.pt")
    assert encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 24)
    assert meta["method"] == "EqualAndSpread"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_commands_of_the_front_pages_name_their_models(page: str) -> None:
    lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "inference.json" in line]
    predicting = [line for line in lines if "--slide " in line]
    assert predicting
    assert all("--encoder" in line and "--classifier" in line for line in predicting), predicting
