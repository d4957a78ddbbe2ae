from .ahead import AheadLoader as AheadLoader
from .classify import SlideClassifier as SlideClassifier, SlidePrediction as SlidePrediction
from .embed import FeatureEmbedder as FeatureEmbedder, embed_slides as embed_slides, embed_tiles as embed_tiles
from .encoder import bundle_encoder as bundle_encoder
from .evaluator import SlideEvaluator as SlideEvaluator
from .evidence import SlideEvidence as SlideEvidence
from .slides import IndexSlided as IndexSlided, slide_items as slide_items

__all__ = [
    "AheadLoader",
    "FeatureEmbedder",
    "IndexSlided",
    "SlideClassifier",
    "SlideEvaluator",
    "SlideEvidence",
    "SlidePrediction",
    "bundle_encoder",
    "embed_slides",
    "embed_tiles",
    "slide_items",
]
