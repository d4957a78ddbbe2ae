from .ahead import AheadLoader as AheadLoader
from .browse import CellBrowser as CellBrowser
from .classify import SlideClassifier as SlideClassifier, SlidePrediction as SlidePrediction
from .embed import FeatureEmbedder as FeatureEmbedder, embed_slides as embed_slides, embed_tiles as embed_tiles
from .encoder import bundle_encoder as bundle_encoder
from .evaluator import SlideEvaluator as SlideEvaluator
from .evidence import SlideEvidence as SlideEvidence
from .merge import ShardMerger as ShardMerger, merge_shards as merge_shards
from .slides import IndexSlided as IndexSlided, slide_items as slide_items, slide_records as slide_records

__all__ = [
    "AheadLoader",
    "CellBrowser",
    "FeatureEmbedder",
    "IndexSlided",
    "ShardMerger",
    "SlideClassifier",
    "SlideEvaluator",
    "SlideEvidence",
    "SlidePrediction",
    "bundle_encoder",
    "embed_slides",
    "embed_tiles",
    "merge_shards",
    "slide_items",
    "slide_records",
]
