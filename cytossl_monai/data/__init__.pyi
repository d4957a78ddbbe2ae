from .bags.choice import TilesPerSlided as TilesPerSlided, choose_tiles as choose_tiles
from .bags.dataset import BagDataset as BagDataset, collate_bags as collate_bags
from .bags.exchange import (
    FeatureExporter as FeatureExporter,
    export_clam as export_clam,
    export_trident as export_trident,
)
from .bags.features import read_features as read_features, write_features as write_features
from .bags.items import bag_encoder as bag_encoder, bag_items as bag_items
from .bags.sampler import BagBatchSampler as BagBatchSampler
from .bags.splits import assign_folds as assign_folds, hold_out as hold_out, split_items as split_items
from .bags.transforms import (
    LoadBagd as LoadBagd,
    RandTileDropoutd as RandTileDropoutd,
    RandTileSampled as RandTileSampled,
)
from .slide_table import (
    SlideRecord as SlideRecord,
    read_slide_table as read_slide_table,
    write_slide_table as write_slide_table,
)
from .slides.cache import SlideCache as SlideCache
from .slides.open import open_slide as open_slide
from .slides.pool import SlidePool as SlidePool
from .slides.slide import Slide as Slide
from .slides.write import write_pyramid as write_pyramid
from .synthetic.slides import make_slides as make_slides
from .tiles.cache import TileCache as TileCache
from .tiles.dataset import MixedDataset as MixedDataset, TileDataset as TileDataset
from .tiles.images import ImageFolder as ImageFolder, list_images as list_images
from .tiles.index_file import TileIndex as TileIndex
from .tiles.labelled import LabelledImages as LabelledImages, training_mpp as training_mpp
from .tiles.loader import tile_loader as tile_loader
from .tiles.outlines import KnownNuclei as KnownNuclei, NucleusOutlines as NucleusOutlines
from .tiles.sampler import SSLBatchSampler as SSLBatchSampler

__all__ = [
    "BagBatchSampler",
    "BagDataset",
    "FeatureExporter",
    "ImageFolder",
    "KnownNuclei",
    "LabelledImages",
    "LoadBagd",
    "MixedDataset",
    "NucleusOutlines",
    "RandTileDropoutd",
    "RandTileSampled",
    "SSLBatchSampler",
    "Slide",
    "SlideCache",
    "SlidePool",
    "SlideRecord",
    "TileCache",
    "TileDataset",
    "TileIndex",
    "TilesPerSlided",
    "assign_folds",
    "bag_encoder",
    "bag_items",
    "choose_tiles",
    "collate_bags",
    "export_clam",
    "export_trident",
    "hold_out",
    "list_images",
    "make_slides",
    "open_slide",
    "read_features",
    "read_slide_table",
    "split_items",
    "tile_loader",
    "training_mpp",
    "write_features",
    "write_pyramid",
    "write_slide_table",
]
