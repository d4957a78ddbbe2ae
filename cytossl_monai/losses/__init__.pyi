from .byol import BYOLLoss as BYOLLoss
from .dino import DINOLoss as DINOLoss
from .ibot import IBOTPatchLoss as IBOTPatchLoss
from .info_nce import InfoNCELoss as InfoNCELoss
from .koleo import KoLeoLoss as KoLeoLoss
from .mae import MaskedPixelLoss as MaskedPixelLoss
from .nt_xent import NTXentLoss as NTXentLoss
from .vpu import VPULoss as VPULoss

__all__ = [
    "BYOLLoss",
    "DINOLoss",
    "IBOTPatchLoss",
    "InfoNCELoss",
    "KoLeoLoss",
    "MaskedPixelLoss",
    "NTXentLoss",
    "VPULoss",
]
