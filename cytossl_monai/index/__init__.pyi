from .build import (
    SlideIndexer as SlideIndexer,
    index_slide as index_slide,
    index_slides as index_slides,
)
from .detected import detected_nuclei as detected_nuclei, read_detections as read_detections
from .fields import NucleusFields as NucleusFields, instance_fields as instance_fields
from .imported import TileImporter as TileImporter, import_index as import_index
from .low_power import InkRules as InkRules
from .settings import IndexSettings as IndexSettings

__all__ = [
    "IndexSettings",
    "InkRules",
    "NucleusFields",
    "SlideIndexer",
    "TileImporter",
    "detected_nuclei",
    "import_index",
    "index_slide",
    "index_slides",
    "instance_fields",
    "read_detections",
]
