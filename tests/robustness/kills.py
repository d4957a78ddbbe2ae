"""Runs of every step that are killed at random moments and started again: equal to a run that nobody killed?

Each run is a child of this process, in a group of its own, so that the libraries are loaded once and a kill takes
loader workers and folds along, as a batch system does.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image

from cytossl_monai.data.bags.features import write_features
from cytossl_monai.data.slide_table import read_slide_table
from cytossl_monai.data.synthetic.slides import make_slides
from cytossl_monai.data.tiles.index_file import TileIndex
from cytossl_monai.engines.bundle import run_training
from cytossl_monai.engines.mil.cross_validate import cross_validate
from cytossl_monai.engines.mil.few_shot import few_shot_curve
from cytossl_monai.engines.study.ablation import AblationStudy, read_study
from cytossl_monai.engines.study.table import write_table
from cytossl_monai.index.build import IndexSettings, SlideIndexer, index_slides
from cytossl_monai.inference.embed import embed_slides
from cytossl_monai.networks.files import load_encoder, save_classifier, save_encoder
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {name: ROOT / "bundles" / f"cytossl_{name}" / "configs" for name in ("pretrain", "mil", "inference")}
KILLED = ("equal", "left over", "differs", "too late")
"""After the next run equal to one that nobody killed; equal, but something unfinished lies about; not equal. Too late:
the run had ended before the signal came."""
TELLS_OF_TIME = ("second", "time", "date", "images_per_s", "wait_share", "memory", "created", "train_loss")
"""Figures and facts of the clock and the machine, which differ between two runs that nobody killed; and the mean loss
of an epoch, which a resumed run counts from where it goes on (the loss of every step is compared)."""


class Inputs:
    """Three small slides with index, encoder and classifier, and a cohort of feature files; made once."""

    def __init__(self, root: Path) -> None:
        self.slides = make_slides(root / "slides", 3, 1024, seed=3, density=900.0, blur=0, progress=False)
        self.index = root / "index"
        records = read_slide_table(self.slides)
        index_slides(records, self.index, IndexSettings(tile_size=96), num_workers=0, overview=False, progress=False)
        torch.manual_seed(0)
        network = sr_vit_tiny(hidden_size=16, mlp_dim=32, num_layers=1, num_heads=1, img_size=96, num_salient=4)
        encoder = Encoder(network, pool="mean").eval()
        self.encoder = root / "encoder.pt"
        save_encoder(self.encoder, encoder, {"name": "toy"})
        known = {"hash": encoder_hash(encoder), "name": "toy", "dim": encoder.embed_dim}
        self.classifier = root / "classifier.pt"
        heads = ABMIL(encoder.embed_dim, 2, embed_dim=8, attention_dim=8)
        save_classifier(self.classifier, MILClassifier(heads, ["negative", "positive"], encoder=known).eval())
        self.features, self.cohort = root / "features", root / "cohort.csv"
        rng, lines = np.random.default_rng(0), ["slide_id,path,label,patient_id"]
        for number in range(18):
            tiles = rng.standard_normal((20, 8)) + (number % 2)
            places, facts = rng.integers(0, 900, (20, 2)), {"encoder": "abc", "encoder_name": "toy"}
            write_features(self.features / f"s{number}.h5", tiles.astype("f4"), places, facts)
            lines.append(f"s{number},s{number}.svs,{number % 2},p{number}")
        self.cohort.write_text("\n".join(lines) + "\n")
        self.images = root / "images"
        for number in range(24):
            folder = self.images / "cells" / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(180, 220, (32, 32, 3), dtype=np.uint8)
            pixels[10:20, 10:20] = 40 + 60 * (number % 2)
            Image.fromarray(pixels).save(folder / f"{number}.png")


def run_index(given: Inputs, out: Path) -> int:
    return SlideIndexer(given.slides, out, num_workers=1, progress=False).run().exit_code


def run_pretrain(given: Inputs, out: Path) -> int:
    small = {"num_layers": 1, "num_heads": 1, "hidden_size": 16, "mlp_dim": 32, "num_salient": 2, "num_keys": 4}
    settings = {
        "dataset_dir": str(given.index), "output_dir": str(out), "device": "$torch.device('cpu')",
        "backbone": {"_target_": "cytossl_monai.networks.sr_vit_tiny", "img_size": 32, **small},
        "steps": 12, "epoch_length": 4, "batch_size": 4, "num_workers": 1, "input_size": 32, "views#n_local": 0,
        "prototypes": 32, "head_hidden_dim": 16, "log_every": 1, "monitor_every": 4, "checkpoint_steps": 2,
        "tensorboard": False, "precision": "fp32",
    }  # fmt: skip
    run_training([CONFIGS["pretrain"] / "train.json"], settings)
    return 0


def run_embed(given: Inputs, out: Path) -> int:
    encoder, _ = load_encoder(given.encoder)
    return embed_slides(read_slide_table(given.slides), given.index, out, encoder, progress=False).exit_code


def run_folds(given: Inputs, out: Path) -> int:
    overrides = {"epochs": 2, "min_epochs": 1, "device": "cpu"}
    common = (CONFIGS["mil"] / "train.json", given.cohort, given.features, out)
    cross_validate(*common, n_folds=3, overrides=overrides, num_workers=1, n_resamples=20)
    return 0


def run_few_shot(given: Inputs, out: Path) -> int:
    overrides = {"epochs": 1, "min_epochs": 1, "device": "cpu"}
    common = (CONFIGS["mil"] / "train.json", given.cohort, given.features, out)
    few_shot_curve(*common, shots=(1, 2), repeats=2, overrides=overrides, num_workers=1)
    return 0


def run_inference(given: Inputs, out: Path) -> int:
    settings = {
        "slides": str(given.slides), "encoder": str(given.encoder), "classifier": str(given.classifier),
        "output_dir": str(out), "device": torch.device("cpu"), "tile_size": 96, "mpp": 0.5, "overview_size": 256,
        "top_tiles": 2, "num_threads": 1, "progress": False,
    }  # fmt: skip
    config = str(CONFIGS["inference"] / "inference.json")
    workflow = ConfigWorkflow(config, workflow_type="infer", logging_file=False, **settings)
    workflow.initialize()
    workflow.run()
    return 0


def run_ablation(given: Inputs, out: Path) -> int:
    """Two runs of the study of the checkout, smaller, with their probes and tables, as the script does them."""
    content = read_study(ROOT / "configs/study/ablation.yaml")
    content["methods"] = {"simclr": content["methods"]["simclr"]}
    content["settings"] |= {
        "image_size": 24, "image_read_mpp": 0.25, "steps": 8, "epoch_length": 4, "batch_size": 4, "log_every": 1,
        "checkpoint_steps": 2, "precision": "fp32", "device": "$torch.device('cpu')", "num_workers": 0,
        "views#global_size": 24, "backbone#img_size": 24, "backbone#patch_size": 6, "backbone#hidden_size": 12,
        "backbone#mlp_dim": 24, "backbone#num_layers": 1,
    }  # fmt: skip
    content["switches"]["sr"]["on"] = {"backbone#num_salient": 3, "backbone#window": 1}
    content["tasks"] = {"cells": {"source": "cells", "field": 24, "size": 24, "n_folds": 3, "least_filled": 0.0}}
    study = AblationStudy(content, given.images, out, ROOT)
    rows = []
    for run in study.runs(arms=["plain", "both"]):
        rows += study.rows([run.method], [run.arm])
        write_table(rows, out)
    return 0


STEPS: dict[str, Callable[[Inputs, Path], int]] = {
    "index": run_index,
    "pretrain": run_pretrain,
    "embed": run_embed,
    "cross-validation": run_folds,
    "few-shot": run_few_shot,
    "inference": run_inference,
    "ablation": run_ablation,
}


def start(step: Callable[[Inputs, Path], int], given: Inputs, out: Path) -> int:
    """Start a step in a child; its number."""
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):  # the child does the same: whoever comes first
            os.setpgid(child, child)
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        sink = os.open(os.environ.get("CYTOSSL_KILLS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.argv = ["run"]
        torch.set_num_threads(1)
        status = step(given, out)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:  # noqa: BLE001 - a child ends here, whatever came
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Its exit status; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(value: Any) -> Any:
    """Plain content without what tells of time; tensors by their bytes."""
    if isinstance(value, Mapping):
        return {str(k): digest(v) for k, v in value.items() if not any(w in str(k) for w in TELLS_OF_TIME)}
    if isinstance(value, (list, tuple)):
        return [digest(each) for each in value]
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    return value


def content(path: Path, root: Path) -> Any:
    """What a file says, without what tells of time or of the folder it lies in."""
    if path.suffix == ".pt":
        return digest(torch.load(path, weights_only=True))
    if path.suffix == ".parquet":
        import pandas as pd

        meta = TileIndex.read(path).meta if path.parent.name == "index" or path.parent == root else {}
        return pd.read_parquet(path).to_csv(), digest(meta)
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return {name: file[name][()].tobytes() for name in file}
    if path.suffix == ".json":
        told = json.loads(path.read_text().replace(str(root), ""))
        if path.name == "fold.json":
            told.pop("model")  # the bytes of a file of torch.save hold its name on the way; model.pt is compared itself
        told.pop("made", None)  # when a prediction was made
        return digest(told)
    if path.suffix == ".csv":
        with open(path, newline="") as stream:
            rows = list(csv.DictReader(stream))
        if path.name == "report.csv":
            return sorted(row["item"] for row in rows)
        if "figure" in (rows or [{}])[0]:  # the log of pretraining
            rows = [row for row in rows if not any(word in row["figure"] for word in TELLS_OF_TIME)]
        return sorted(json.dumps(digest(row), sort_keys=True) for row in rows)
    return "there"  # pictures and pages: that they are there


def contents(root: Path) -> dict[str, Any]:
    """All that a finished run has made, but for checkpoints on the way and locks."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    names = {path: str(path.relative_to(root)) for path in files}
    return {
        name: content(path, root)
        for path, name in names.items()
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and "checkpoints/" not in name
    }


def unfinished(root: Path) -> list[str]:
    """What a killed run left for good."""
    return [path.name for path in root.rglob("*") if ".partial" in path.name or path.name == ".cytossl.lock"]


def run_kills(kills: int, seed: int = 0, steps: Mapping[str, Any] = STEPS) -> dict[str, Counter[str]]:
    """Each step, killed ``kills`` times at moments drawn from the seed, by SIGKILL or SIGTERM, then run again."""
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        given = Inputs(Path(scratch))
        for name, step in steps.items():
            counts[name] = Counter()
            draw = random.Random(f"{seed} {name}")
            begin = time.perf_counter()
            whole = Path(scratch) / name / "whole"
            assert wait(start(step, given, whole)) == 0, f"{name} fails without any kill"
            length, expected = time.perf_counter() - begin, contents(whole)
            for number in range(kills):
                out = Path(scratch) / name / str(number)
                moment, how = draw.uniform(0.05, 0.95) * length, draw.choice([signal.SIGKILL, signal.SIGTERM])
                child = start(step, given, out)
                time.sleep(moment)
                os.killpg(child, how)  # also of one that has ended: it waits to be asked for its status
                status = wait(child)
                again = wait(start(step, given, out))
                found = contents(out)
                same, left = again == 0 and found == expected, unfinished(out)
                outcome = "differs" if not same else "left over" if left else "too late" if status == 0 else "equal"
                counts[name][outcome] += 1
                if outcome in ("differs", "left over"):
                    other = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
                    print(f"{name} {number}: {how.name} at {moment:.2f} s, again {again}: {other} {left}", flush=True)
    return counts
