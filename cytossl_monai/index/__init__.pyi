from .build import (
    IndexSettings as IndexSettings,
    SlideIndexer as SlideIndexer,
    index_slide as index_slide,
    index_slides as index_slides,
)
from .low_power import InkRules as InkRules

__all__ = ["IndexSettings", "InkRules", "SlideIndexer", "index_slide", "index_slides"]
