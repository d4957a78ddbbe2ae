"""Run the MONAI Deploy application on made-up slides and hold its probabilities to the bundle's own, within 1e-4.

Encoder and classifier are untrained but saved: what is checked is that the application gives what the bundle gives. One
of the slides is written as DICOM too, one is empty.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom
import torch
from dicom_slide import write_dicom_slide
from monai.bundle import ckpt_export

from cytossl_monai.data import make_slides, write_pyramid
from cytossl_monai.networks import ABMIL, MILClassifier, save_classifier, save_encoder, sr_vit_tiny
from cytossl_monai.networks.nets.encoder import Encoder, encoder_hash

ROOT = Path(__file__).resolve().parents[2]
SIDE = 1536


def make_models(folder: Path) -> None:
    """encoder.pt, classifier.pt and its export model.ts, as a release or the demo gives them."""
    torch.manual_seed(0)
    folder.mkdir()
    encoder = Encoder(sr_vit_tiny(num_layers=2)).eval()
    save_encoder(folder / "encoder.pt", encoder, {"name": "check"})
    known = {"hash": encoder_hash(encoder), "name": "check", "dim": encoder.embed_dim}
    classifier = MILClassifier(ABMIL(encoder.embed_dim, 2), ["negative", "positive"], encoder=known, temperature=0.5)
    save_classifier(folder / "classifier.pt", classifier.eval())
    configs = ROOT / "bundles" / "cytossl_mil" / "configs"
    ckpt_export(
        net_id="network_def",
        filepath=str(folder / "model.ts"),
        ckpt_file=str(folder / "classifier.pt"),
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        classifier=str(folder / "classifier.pt"),
    )


def run(title: str, *command: str, expected: int = 0) -> None:
    """Run a step; its output is shown only when it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)
    if done.returncode != expected:
        print(done.stdout)
        raise SystemExit(f"{title}: exit status {done.returncode}, {expected} was expected")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        slides, models, out, own = folder / "slides", folder / "models", folder / "out", folder / "own"
        make_slides(slides, 2, SIDE, seed=5, progress=False)
        write_pyramid(slides / "empty.tif", np.full((SIDE, SIDE, 3), 242, np.uint8), 0.25)
        make_models(models)
        dicom = write_dicom_slide(slides / "slide_0001.tif", folder / "dicom")

        app = [str(ROOT / "scripts" / "deploy" / "app.py"), "--model", str(models)]
        run("application, three slides, one of them empty", *app, "-i", str(slides), "-o", str(out), expected=3)
        run("application, a DICOM slide", *app, "-i", str(dicom), "-o", str(folder / "out_dicom"))
        bundle = str(ROOT / "bundles" / "cytossl_inference" / "configs" / "inference.json")
        settings = ["--dataset_dir", str(slides), "--output_dir", str(own), "--encoder", str(models / "encoder.pt")]
        settings += ["--classifier", str(models / "classifier.pt"), "--progress", "False"]
        run("bundle", "-m", "monai.bundle", "run", "--config_file", bundle, *settings, expected=3)

        worst = 0.0
        for name in ("slide_0000", "slide_0001"):
            prediction = json.loads((out / name / "prediction.json").read_text())
            wanted = json.loads((own / name / "prediction.json").read_text())["probabilities"]
            served = prediction["deploy"]["probabilities"]
            assert list(served) == list(wanted), (served, wanted)
            worst = max(worst, *(abs(served[c] - wanted[c]) for c in wanted))
            assert (out / name / "report.html").stat().st_size > 10_000
        empty = json.loads((out / "empty" / "prediction.json").read_text())
        assert empty["label"] is None, empty
        assert empty["deploy"]["probabilities"] is None, empty
        print(f"largest difference between application and bundle: {worst:.1e}")
        if not worst <= 1e-4:
            raise SystemExit("the application does not give what the bundle gives")

        [report] = (folder / "out_dicom").rglob("report.dcm")
        sr, source = pydicom.dcmread(report), pydicom.dcmread(next(dicom.glob("*.dcm")), stop_before_pixels=True)
        assert sr.Modality == "SR"
        assert sr.StudyInstanceUID == source.StudyInstanceUID
        prediction = json.loads((report.parent / "prediction.json").read_text())
        assert f"Prediction: {prediction['label']}" in sr.ContentSequence[0].TextValue
        print("DICOM slide in, structured report out: same study")


if __name__ == "__main__":
    main()
