from .ncp.array import (
    NucleiCenteredPerturb as NucleiCenteredPerturb,
    RandNucleiCenteredPerturb as RandNucleiCenteredPerturb,
)
from .ncp.batched import BatchedNCP as BatchedNCP
from .ncp.dictionary import (
    NucleiCenteredPerturbD as NucleiCenteredPerturbD,
    NucleiCenteredPerturbd as NucleiCenteredPerturbd,
    NucleiCenteredPerturbDict as NucleiCenteredPerturbDict,
    RandNucleiCenteredPerturbD as RandNucleiCenteredPerturbD,
    RandNucleiCenteredPerturbd as RandNucleiCenteredPerturbd,
    RandNucleiCenteredPerturbDict as RandNucleiCenteredPerturbDict,
)
from .ncp.settings import NCPSettings as NCPSettings
from .nuclei.array import LoadNuclei as LoadNuclei, SegmentNuclei as SegmentNuclei
from .nuclei.centres import NucleiCentres as NucleiCentres
from .nuclei.dictionary import (
    LoadNucleiD as LoadNucleiD,
    LoadNucleid as LoadNucleid,
    LoadNucleiDict as LoadNucleiDict,
    SegmentNucleiD as SegmentNucleiD,
    SegmentNucleid as SegmentNucleid,
    SegmentNucleiDict as SegmentNucleiDict,
)
from .nuclei.instances import segment_instances as segment_instances
from .nuclei.mask import nuclei_mask as nuclei_mask
from .nuclei.regions import RegionRules as RegionRules
from .tiling.array import LoadSlide as LoadSlide, LoadTile as LoadTile, TileSlide as TileSlide
from .tiling.dictionary import (
    IterateTiles as IterateTiles,
    LabelTilesD as LabelTilesD,
    LabelTilesd as LabelTilesd,
    LabelTilesDict as LabelTilesDict,
    LoadSlideD as LoadSlideD,
    LoadSlided as LoadSlided,
    LoadSlideDict as LoadSlideDict,
    LoadTileD as LoadTileD,
    LoadTiled as LoadTiled,
    LoadTileDict as LoadTileDict,
    TileSlideD as TileSlideD,
    TileSlided as TileSlided,
    TileSlideDict as TileSlideDict,
)
from .views.array import RandCropAtNucleus as RandCropAtNucleus, RandStainJitter as RandStainJitter
from .views.boxes import native_scale as native_scale
from .views.dictionary import (
    RandCropAtNucleusD as RandCropAtNucleusD,
    RandCropAtNucleusd as RandCropAtNucleusd,
    RandCropAtNucleusDict as RandCropAtNucleusDict,
    RandStainJitterD as RandStainJitterD,
    RandStainJitterd as RandStainJitterd,
    RandStainJitterDict as RandStainJitterDict,
)
from .views.generator import ViewGenerator as ViewGenerator

__all__ = [
    "BatchedNCP",
    "IterateTiles",
    "LabelTilesD",
    "LabelTilesDict",
    "LabelTilesd",
    "LoadNuclei",
    "LoadNucleiD",
    "LoadNucleiDict",
    "LoadNucleid",
    "LoadSlide",
    "LoadSlideD",
    "LoadSlideDict",
    "LoadSlided",
    "LoadTile",
    "LoadTileD",
    "LoadTileDict",
    "LoadTiled",
    "NCPSettings",
    "NucleiCenteredPerturb",
    "NucleiCenteredPerturbD",
    "NucleiCenteredPerturbDict",
    "NucleiCenteredPerturbd",
    "NucleiCentres",
    "RandCropAtNucleus",
    "RandCropAtNucleusD",
    "RandCropAtNucleusDict",
    "RandCropAtNucleusd",
    "RandNucleiCenteredPerturb",
    "RandNucleiCenteredPerturbD",
    "RandNucleiCenteredPerturbDict",
    "RandNucleiCenteredPerturbd",
    "RandStainJitter",
    "RandStainJitterD",
    "RandStainJitterDict",
    "RandStainJitterd",
    "RegionRules",
    "SegmentNuclei",
    "SegmentNucleiD",
    "SegmentNucleiDict",
    "SegmentNucleid",
    "TileSlide",
    "TileSlideD",
    "TileSlideDict",
    "TileSlided",
    "ViewGenerator",
    "native_scale",
    "nuclei_mask",
    "segment_instances",
]
