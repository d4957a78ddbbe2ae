"""How much a pretrained encoder knows of cells that it never saw a label of.

    python scripts/study/representation.py --encoder out/pretrain/models/model.pt --data DATA --out representation.md

Tasks, under the folder DATA: the cell classes of ``cells/<class>/*.jpg`` (five random stratified folds), and crops
centred on the marked nuclei of ``cric`` (folds by blocks of ten image numbers, since neighbours share a slide). Both
are read at 0.25 um/px. Each task is solved by weighted kNN and by a linear probe on features of (a) the encoder,
(b) the same encoder with random weights, (c) mean colour and nuclear area. The figures are balanced accuracies with
95 % intervals over the folds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from cytossl_monai.engines.study.representation import encode, labelled_task, probe
from cytossl_monai.networks import Encoder, build_encoder, card_network, open_encoder, read_card
from cytossl_monai.transforms import segment_instances
from cytossl_monai.utils.files import write_text

SOURCE_MPP = 0.25


def plain_features(images: torch.Tensor, mpp: float) -> np.ndarray:
    """(N, 7): mean colour, and number, mean, largest and total area of the nuclei."""
    rows = []
    for image in images:
        areas = segment_instances(image, mpp).table["area_um2"].to_numpy()
        sizes = [areas.mean(), areas.max(), areas.sum()] if len(areas) else [0.0, 0.0, 0.0]
        rows.append([*image.double().mean((1, 2)).tolist(), len(areas), *sizes])
    return np.asarray(rows, dtype=np.float32)


def random_twin(trained: Encoder, source: str) -> Encoder | None:
    """The same encoder with random weights; None for a program, which cannot be built anew."""
    if Path(source).suffix in (".yaml", ".yml"):
        card = read_card(source)
        if card.architecture in ("program", "callable"):
            return None
        return Encoder(card_network(card, None), card.pool, card.mean, card.std).eval()
    if not hasattr(trained.network, "config"):
        return None
    return build_encoder(torch.load(source, map_location="cpu", weights_only=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoder", required=True, help="model.pt that pretraining wrote, or any that open_encoder opens"
    )
    parser.add_argument("--weights", help="the weights' file or folder, where the encoder is a card")
    parser.add_argument("--data", type=Path, required=True, help="folder with cells/ and cric/")
    parser.add_argument("--out", type=Path, help="Markdown table to write")
    parser.add_argument("--field", type=int, default=192, help="side of the crop in pixels at 0.25 um/px")
    parser.add_argument("--size", type=int, default=96, help="side that the encoder sees")
    args = parser.parse_args()

    trained, _ = open_encoder(args.encoder, args.weights)
    torch.manual_seed(0)
    untrained = random_twin(trained, args.encoder)

    lines = ["| task | features | kNN | linear probe |", "|---|---|---|---|"]
    print("\n".join(lines))
    scale = {"size": args.size, "mpp": SOURCE_MPP, "field": args.field}
    for task in (
        labelled_task("cells", args.data / "cells", **scale),
        labelled_task("cric", args.data / "cric" / "cells.csv", group_block=10, **scale),
    ):
        for kind, features in (
            ("(a) pretrained", encode(trained, task.images)),
            *([("(b) random weights", encode(untrained, task.images))] if untrained else []),
            ("(c) colour and nuclear area", plain_features(task.images, task.mpp)),
        ):
            if kind.startswith("(c)"):  # units differ: without scaling the areas alone would decide who is near
                features = (features - features.mean(0)) / features.std(0).clip(1e-6)
            cells = [
                f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})" for found in probe(features, task).values()
            ]
            lines.append(f"| {task.name}, {len(task.classes)} classes | {kind} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if args.out:
        write_text(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
