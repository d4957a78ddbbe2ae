"""The prediction on a DICOM slide as a DICOM Basic Text SR in the slide's own study."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cytossl_monai
from cytossl_monai.utils.files import atomic_path

__all__ = ["is_dicom", "report_text", "write_text_report"]

# Patient and study: what a report shares with the slide that it is about.
_COPIED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID", "StudyDate",
    "StudyTime", "StudyDescription", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
_BASIC_TEXT_SR = "1.2.840.10008.5.1.4.1.1.88.11"


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file is DICOM, by its preamble."""
    try:
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def report_text(answer: Mapping[str, Any]) -> str:
    """The content of ``prediction.json`` as a few lines of text."""
    lines = [f"Slide: {answer['slide_id']}"]
    if answer.get("label") is None:
        lines += [f"No cells found: {answer.get('reason', '')}", "No prediction was made."]
    else:
        lines.append(f"Prediction: {answer['label']}")
        lines += [f"Probability of {name}: {p:.4f}" for name, p in answer["probabilities"].items()]
        lines.append(f"Tiles with nuclei: {answer['tiles']['count']}")
    return "\n".join([*lines, str(answer["notice"])])


def write_text_report(slide: str | os.PathLike[str], answer: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the report; needs pydicom, which the environment of a MONAI Deploy application has.

    Args:
        slide: any file of the DICOM slide: patient and study are taken from it, and the report refers to it.
        answer: the content of ``prediction.json``.
        path: the file to write.

    Returns:
        the path.
    """
    from pydicom import Dataset, dcmread
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    def code(value: str, scheme: str, meaning: str) -> list[Dataset]:
        ds = Dataset()
        ds.CodeValue, ds.CodingSchemeDesignator, ds.CodeMeaning = value, scheme, meaning
        return [ds]

    def text(value: str, meaning: tuple[str, str, str]) -> Dataset:
        ds = Dataset()
        ds.RelationshipType, ds.ValueType, ds.TextValue = "CONTAINS", "TEXT", value
        ds.ConceptNameCodeSequence = code(*meaning)
        return ds

    source = dcmread(slide, stop_before_pixels=True)
    now = datetime.datetime.now()
    report = Dataset()
    for keyword in _COPIED:
        setattr(report, keyword, getattr(source, keyword, ""))
    report.SOPClassUID, report.SOPInstanceUID = _BASIC_TEXT_SR, generate_uid()
    report.SeriesInstanceUID, report.SeriesNumber, report.InstanceNumber = generate_uid(), 1, 1
    report.Modality, report.SeriesDescription = "SR", "Cyto-SSL slide prediction (research use only)"
    report.Manufacturer, report.ManufacturerModelName = "Cyto-SSL on MONAI", "cytossl_inference"
    report.SoftwareVersions = cytossl_monai.__version__
    report.ContentDate, report.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    report.CompletionFlag, report.VerificationFlag = "COMPLETE", "UNVERIFIED"
    report.ReferencedPerformedProcedureStepSequence = []
    report.PerformedProcedureCodeSequence = []
    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    series = Dataset()
    series.SeriesInstanceUID, series.ReferencedSOPSequence = source.SeriesInstanceUID, [image]
    study = Dataset()
    study.StudyInstanceUID, study.ReferencedSeriesSequence = source.StudyInstanceUID, [series]
    report.CurrentRequestedProcedureEvidenceSequence = [study]
    report.ValueType, report.ContinuityOfContent = "CONTAINER", "SEPARATE"
    report.ConceptNameCodeSequence = code("11526-1", "LN", "Pathology study")
    report.ContentSequence = [text(report_text(answer), ("111412", "DCM", "Narrative Summary"))]
    report.file_meta = FileMetaDataset()
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID
    report.file_meta.MediaStorageSOPInstanceUID = report.SOPInstanceUID
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    with atomic_path(path) as partial:
        report.save_as(partial, enforce_file_format=True)
    return Path(path)
