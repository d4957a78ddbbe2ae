"""A TIFF slide as a DICOM whole-slide image (VL Whole Slide Microscopy, tiled, one level), for the check."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

from cytossl_monai.data import open_slide

TILE = 256


def _code(value: str, scheme: str, meaning: str) -> list[Dataset]:
    ds = Dataset()
    ds.CodeValue, ds.CodingSchemeDesignator, ds.CodeMeaning = value, scheme, meaning
    return [ds]


def _jpeg(tile: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(tile).save(stream, "JPEG", quality=95, subsampling=0)
    return stream.getvalue()


def write_dicom_slide(slide: Path, folder: Path) -> Path:
    """Write level 0 of a slide as one DICOM file in a folder of its own; returns the folder."""
    with open_slide(slide) as opened:
        pixels = np.moveaxis(opened.read_region(0, 0, (opened.width, opened.height)), 0, -1)
        mpp = opened.mpp
    height, width = pixels.shape[:2]
    rows, columns = -(-height // TILE), -(-width // TILE)
    padded = np.full((rows * TILE, columns * TILE, 3), 255, np.uint8)
    padded[:height, :width] = pixels
    frames = [
        _jpeg(padded[y : y + TILE, x : x + TILE])
        for y in range(0, rows * TILE, TILE)
        for x in range(0, columns * TILE, TILE)
    ]
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = VLWholeSlideMicroscopyImageStorage, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = generate_uid(), generate_uid(), generate_uid()
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Made^Up", "P1", "", ""
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20260101", "120000", "1", "A1"
    ds.ReferringPhysicianName, ds.Manufacturer, ds.ManufacturerModelName = "", "Cyto-SSL", "synthetic"
    ds.DeviceSerialNumber, ds.SoftwareVersions, ds.SeriesNumber, ds.InstanceNumber = "0", "0", 1, 1
    ds.Modality, ds.ContainerIdentifier = "SM", "S1"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.Rows, ds.Columns, ds.NumberOfFrames = TILE, TILE, len(frames)
    ds.TotalPixelMatrixColumns, ds.TotalPixelMatrixRows = width, height
    ds.TotalPixelMatrixFocalPlanes, ds.NumberOfOpticalPaths = 1, 1
    ds.ImagedVolumeWidth, ds.ImagedVolumeHeight, ds.ImagedVolumeDepth = width * mpp / 1e3, height * mpp / 1e3, 0.001
    ds.DimensionOrganizationType = "TILED_FULL"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "YBR_FULL_422", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.LossyImageCompression, ds.LossyImageCompressionMethod, ds.LossyImageCompressionRatio = "01", "ISO_10918_1", 10
    ds.BurnedInAnnotation, ds.SpecimenLabelInImage, ds.FocusMethod, ds.ExtendedDepthOfField = "NO", "NO", "AUTO", "NO"
    ds.AcquisitionDateTime, ds.VolumetricProperties = "20260101120000", "VOLUME"
    path = Dataset()
    path.OpticalPathIdentifier = "1"
    path.IlluminationTypeCodeSequence = _code("111744", "DCM", "Brightfield illumination")
    ds.OpticalPathSequence = [path]
    measures, shared, frame_type = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1e3, mpp / 1e3], 0.001
    frame_type.FrameType = ds.ImageType
    shared.PixelMeasuresSequence, shared.WholeSlideMicroscopyImageFrameTypeSequence = [measures], [frame_type]
    ds.SharedFunctionalGroupsSequence = [shared]
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 0.0, 0.0
    ds.TotalPixelMatrixOriginSequence = [origin]
    ds.ImageOrientationSlide = [0.0, -1.0, 0.0, -1.0, 0.0, 0.0]
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].is_undefined_length = True
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    folder.mkdir(parents=True, exist_ok=True)
    ds.save_as(folder / "level0.dcm", enforce_file_format=True)
    return folder
