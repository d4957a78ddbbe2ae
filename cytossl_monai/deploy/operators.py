"""`SlideToBag` and `PredictionWriter` as operators of MONAI Deploy App SDK 4.

Without the SDK the module imports all the same, and ``compute`` can be called with anything that has ``receive`` and
``emit``; only putting the operators into an application needs the SDK.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from cytossl_monai.data.slide_table import SlideRecord
from cytossl_monai.deploy.dicom_report import is_dicom, write_text_report
from cytossl_monai.deploy.prediction_writer import PredictionWriter
from cytossl_monai.deploy.slide_bag import SlideToBag
from cytossl_monai.utils.report import RunReport

_operator, HAS_SDK = optional_import("monai.deploy.core", name="Operator")
Operator: Any = _operator if HAS_SDK else object

__all__ = ["HAS_SDK", "PredictionWriterOperator", "SlideToBagOperator"]


class SlideToBagOperator(Operator):  # type: ignore[misc]
    """Source: one slide a tick. Give it a ``CountCondition`` of as many ticks as there are slides.

    Outputs: ``image``, the bag (N, D) float32 tensor for ``MonaiBundleInferenceOperator`` (MONAI knows a network's
    input by that name only), and ``item`` for `PredictionWriterOperator`.

    Args:
        fragment: the application.
        *args: conditions.
        slides: the slides, as `find_slides` gives them.
        read: what reads one.
        **kwargs: as every operator takes, such as ``name``.
    """

    def __init__(
        self, fragment: Any, *args: Any, slides: Sequence[SlideRecord], read: SlideToBag, **kwargs: Any
    ) -> None:
        self.slides, self.read = list(slides), read
        self._left: Iterator[SlideRecord] = iter(self.slides)
        # The SDK's operators set themselves up in their constructor, so the fields come first.
        if HAS_SDK:
            super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: Any) -> None:
        """Declare the ports."""
        spec.output("image")
        spec.output("item")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Read the next slide."""
        item = self.read(next(self._left))
        op_output.emit(self.read.bag(item), "image")
        op_output.emit(item, "item")


class PredictionWriterOperator(Operator):  # type: ignore[misc]
    """Sink: the prediction (input ``pred``) and the slide (input ``item``) become files.

    A slide that failed, or without cells, costs only itself: it is told in ``report``. For DICOM slides a DICOM
    structured report is written as well, into the study of the slide.

    Args:
        fragment: the application.
        *args: conditions.
        write: what writes the files.
        report: where each slide is told.
        dicom: write the structured report for DICOM slides.
        **kwargs: as every operator takes, such as ``name``.
    """

    def __init__(
        self,
        fragment: Any,
        *args: Any,
        write: PredictionWriter,
        report: RunReport,
        dicom: bool = True,
        **kwargs: Any,
    ) -> None:
        self.write, self.report, self.dicom = write, report, dicom
        if HAS_SDK:
            super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: Any) -> None:
        """Declare the ports."""
        spec.input("pred")
        spec.input("item")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write one slide."""
        prediction, item = op_input.receive("pred"), op_input.receive("item")
        # The operator's own "result" names a class for each probability, cut to 0 or 1: only the numbers are of use.
        answer = self.write(item, prediction["probabilities"])
        status, why = item.get("problem", ("done", str(answer.get("label"))))
        path = Path(item["record"].path)
        if answer and self.dicom and is_dicom(path):
            write_text_report(path, answer, self.write.output_dir / item["slide_id"] / "report.dcm")
        self.report.add(item["slide_id"], status, why)
        self.report.save()
