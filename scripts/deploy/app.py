"""Cyto-SSL as a MONAI Deploy application: slides in, predictions with their evidence out.

python scripts/deploy/app.py --input slide.svs --output out --model models

The model folder holds encoder.pt (pretraining), classifier.pt (cytossl_mil) and model.ts (its ckpt_export). Packaged as
a MONAI Application Package, the paths come from HOLOSCAN_INPUT_PATH, HOLOSCAN_OUTPUT_PATH and HOLOSCAN_MODEL_PATH.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application
from monai.deploy.core.domain import Image
from monai.deploy.core.io_type import IOType
from monai.deploy.operators.monai_bundle_inference_operator import (
    BundleConfigNames,
    IOMapping,
    MonaiBundleInferenceOperator,
)

from cytossl_monai.data.slides.slide import BACKENDS
from cytossl_monai.deploy.exported import check_exported
from cytossl_monai.deploy.operators import PredictionWriterOperator, SlideToBagOperator
from cytossl_monai.deploy.prediction_writer import PredictionWriter
from cytossl_monai.deploy.slide_bag import SlideToBag, find_slides
from cytossl_monai.utils import InputError, RunReport, plain_errors

# cuCIM 26.10 crashes inside the SDK's runtime, Holoscan 4.6 (segmentation fault in its batched reads): take OpenSlide.
BACKENDS.pop("cucim", None)

CONFIG = Path(__file__).resolve().parents[2] / "bundles" / "cytossl_mil" / "configs" / "inference.json"
"""What model.ts is exported with; the SDK evaluates what lies in the file, so that nothing else may."""


class CytoSSLApp(Application):
    """Slide -> bag of features -> exported classifier -> prediction and report."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        output = Path(settings.output)
        models = Path(settings.model)
        check_exported(models / "model.ts", settings.config)  # before the SDK builds anything from it
        self.slides = find_slides(settings.input, settings.mpp)
        self.read = SlideToBag(
            models / "encoder.pt",
            output / "cache" / "index",
            instances=settings.instances,
            fields={"size": settings.field_size, "mpp": settings.field_mpp},
        )
        self.writer = PredictionWriter(
            models / "model.ts", models / "classifier.pt", output, self.read.encoder, self.read.encoder_hash
        )
        self.report = RunReport("deploy", output / "report.csv")
        super().__init__()

    def compose(self) -> None:
        """Connect the operators."""
        slide = SlideToBagOperator(
            self, CountCondition(self, len(self.slides)), slides=self.slides, read=self.read, name="slide"
        )
        classify = MonaiBundleInferenceOperator(
            self,
            # No model in the context: the operator loads model.ts itself, the folder's other files are not its own.
            app_context=AppContext({"model": ""}),
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", dict, IOType.IN_MEMORY)],
            bundle_path=str(Path(self.settings.model) / "model.ts"),
            bundle_config_names=BundleConfigNames(config_names=["inference"]),
            name="classify",
        )
        write = PredictionWriterOperator(self, write=self.writer, report=self.report, name="write")
        self.add_flow(slide, classify, {("image", "image")})
        self.add_flow(classify, write, {("pred", "pred")})
        self.add_flow(slide, write, {("item", "item")})


def main() -> int:
    plain_errors()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = os.environ.get
    parser.add_argument("-i", "--input", default=environment("HOLOSCAN_INPUT_PATH"), help="slide, or folder of slides")
    parser.add_argument("-o", "--output", default=environment("HOLOSCAN_OUTPUT_PATH", "output"))
    parser.add_argument("-m", "--model", default=environment("HOLOSCAN_MODEL_PATH", "models"))
    parser.add_argument("--config", default=CONFIG, help="the inference.json that model.ts was exported with")
    parser.add_argument("--mpp", type=float, help="micrometres per pixel, where the slides do not say")
    parser.add_argument(
        "--instances", default="tiles", choices=("tiles", "nuclei"), help="as the classifier was trained"
    )
    parser.add_argument("--field_size", type=int, default=96, help="of a nucleus' field, pixels at --field_mpp")
    parser.add_argument("--field_mpp", type=float, default=0.5, help="of a nucleus' field, micrometres per pixel")
    settings = parser.parse_args()
    if not settings.input:
        parser.error("give the slide, or a folder of slides, with --input")
    try:
        app = CytoSSLApp(settings)
    except InputError as error:
        parser.exit(1, f"app.py: {error}\n")
    app.run()
    if len(app.report.items) < len(app.slides):
        print(f"deploy: stopped after {len(app.report.items)} of {len(app.slides)} slides", file=sys.stderr)
        return 1
    print(app.report.summary())
    return app.report.exit_code


if __name__ == "__main__":
    # Holoscan reads the command line as well; it must find nothing there.
    code = main()
    sys.exit(code)
