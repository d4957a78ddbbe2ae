"""Tiny encoders and classifiers, and a run of the inference bundle in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tifffile
import torch
from monai.bundle import ConfigWorkflow

from cytossl_monai.networks.files import save_classifier, save_encoder
from cytossl_monai.networks.mil.abmil import ABMIL
from cytossl_monai.networks.mil.classifier import MILClassifier
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash
from cytossl_monai.networks.nets.sr_presets import sr_vit_tiny

CONFIGS = Path(__file__).resolve().parents[2] / "bundles" / "cytossl_inference" / "configs"


@dataclass(frozen=True)
class Cohort:
    """What inference needs."""

    slides: Path
    index: Path
    encoder: Path
    classifier: Path

    def path(self, number):
        return self.slides.parent / f"slide_{number:04d}.tif"


def make_encoder(path, width=16, seed=0):
    torch.manual_seed(seed)
    network = sr_vit_tiny(hidden_size=width, mlp_dim=32, num_layers=1, num_heads=1, img_size=96, num_salient=4)
    encoder = Encoder(network, pool="mean").eval()
    save_encoder(path, encoder, {"name": f"toy{width}"})
    return encoder


def make_classifier(path, encoder, seed=0, classes=("negative", "positive")):
    torch.manual_seed(seed)
    network = ABMIL(encoder.embed_dim, len(classes), embed_dim=8, attention_dim=8)
    network.set_standardisation(torch.zeros(encoder.embed_dim), torch.full((encoder.embed_dim,), 0.3))
    known = {"hash": encoder_hash(encoder), "name": "toy", "dim": encoder.embed_dim}
    return save_classifier(path, MILClassifier(network, classes, encoder=known).eval())


def spoil(source, target, damage):
    """A copy of a slide whose file tiles (numbers, of the level read at 0.5 um/px) lost their middle."""
    content = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as tiff:
        page = tiff.series[0].levels[1].pages[0]
        spans = [(page.dataoffsets[n], page.databytecounts[n]) for n in damage]
    for offset, count in spans:
        content[offset + count // 3 : offset + 2 * count // 3] = bytes(2 * count // 3 - count // 3)
    target.write_bytes(content)
    return target


def run_inference(cohort, output_dir, **overrides):
    """Run ``inference.json`` in this process; returns the exit status and the report's lines by slide.

    The slides' index is there already, and no evidence but the table of tiles is written, unless a test asks for it.
    """
    settings = {
        "slides": str(cohort.slides),
        "encoder": str(cohort.encoder),
        "classifier": str(cohort.classifier),
        "output_dir": str(output_dir),
        "index_dir": str(cohort.index),
        "device": torch.device("cpu"),
        "tile_size": 96,
        "mpp": 0.5,
        "overview_size": 512,
        "top_tiles": 4,
        "evidence": ["tiles"],
        "num_threads": 1,
        "progress": False,
        **overrides,
    }
    workflow = ConfigWorkflow(str(CONFIGS / "inference.json"), workflow_type="infer", logging_file=False, **settings)
    workflow.initialize()
    status = 0
    try:
        workflow.run()
    except SystemExit as stop:
        status = stop.code
    return status, {item.item: item for item in workflow.parser.get_parsed_content("report").items}
