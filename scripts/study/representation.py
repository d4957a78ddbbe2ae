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
from PIL import Image

from cytossl_monai.data.image_folder import ImageFolder, ImageRecord, list_images
from cytossl_monai.metrics.linear_probe import group_folds, knn_probe, linear_probe
from cytossl_monai.networks.nets.encoders import Encoder, build_encoder, load_encoder
from cytossl_monai.transforms.nuclei import segment_instances
from cytossl_monai.utils.files import write_text

SOURCE_MPP = 0.25


def cell_task(root: Path) -> tuple[list[ImageRecord], list[str] | None]:
    """Whole crops, centred: a cell keeps its scale, other than if every crop were resized to the same side."""
    records = []
    for record in list_images(root / "cells"):
        with Image.open(record.path) as image:
            width, height = image.size
        records.append(ImageRecord(record.path, record.label, record.group, width / 2, height / 2))
    return records, None


def cric_task(root: Path) -> tuple[list[ImageRecord], list[str] | None]:
    """Marked nuclei; ten neighbouring image numbers are one group."""
    records = list_images(root / "cric" / "cells.csv")
    return records, [str(int(record.path.stem) // 10) for record in records]


def features_of(encoder: Encoder, images: torch.Tensor, batch: int = 64) -> np.ndarray:
    """(N, D) float32 features of uint8 images."""
    encoder.eval()
    with torch.inference_mode():
        return torch.cat([encoder(images[i : i + batch]) for i in range(0, len(images), batch)]).numpy()


def plain_features(images: torch.Tensor, mpp: float) -> np.ndarray:
    """(N, 7): mean colour, and number, mean, largest and total area of the nuclei."""
    rows = []
    for image in images:
        areas = segment_instances(image, mpp).table["area_um2"].to_numpy()
        sizes = [areas.mean(), areas.max(), areas.sum()] if len(areas) else [0.0, 0.0, 0.0]
        rows.append([*image.double().mean((1, 2)).tolist(), len(areas), *sizes])
    return np.asarray(rows, dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="model.pt that pretraining wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder with cells/ and cric/")
    parser.add_argument("--out", type=Path, help="Markdown table to write")
    parser.add_argument("--field", type=int, default=256, help="side of the crop in pixels at 0.25 um/px")
    parser.add_argument("--size", type=int, default=128, help="side that the encoder sees")
    args = parser.parse_args()

    trained, _ = load_encoder(args.encoder)
    torch.manual_seed(0)
    saved = torch.load(args.encoder, map_location="cpu", weights_only=True)
    untrained = build_encoder(saved)
    mpp = SOURCE_MPP * args.field / args.size

    lines = ["| task | features | kNN | linear probe |", "|---|---|---|---|"]
    print("\n".join(lines))
    for name, task in (("cells, 11 classes", cell_task), ("cric, 6 classes", cric_task)):
        records, groups = task(args.data)
        dataset = ImageFolder(records, size=args.size, mpp=SOURCE_MPP, crop=args.field)
        images = torch.stack([item["image"] for item in dataset.__getitems__(range(len(dataset)))])
        labels = np.unique([record.label or "" for record in records], return_inverse=True)[1]
        folds = group_folds(labels.tolist(), groups)
        for kind, features in (
            ("(a) pretrained", features_of(trained, images)),
            ("(b) random weights", features_of(untrained, images)),
            ("(c) colour and nuclear area", plain_features(images, mpp)),
        ):
            if kind.startswith("(c)"):  # units differ: without scaling the areas alone would decide who is near
                features = (features - features.mean(0)) / features.std(0).clip(1e-6)
            cells = []
            for probe in (knn_probe, linear_probe):
                result = probe(features, labels, folds)
                cells.append(f"{result.mean:.3f} ({result.low:.3f} to {result.high:.3f})")
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if args.out:
        write_text(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
