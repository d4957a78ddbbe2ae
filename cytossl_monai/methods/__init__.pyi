from .base import SSLMethod as SSLMethod
from .byol import BYOL as BYOL
from .dino import DINO as DINO
from .ibot import IBOT as IBOT
from .mae import MAE as MAE
from .moco_v3 import MoCoV3 as MoCoV3
from .self_distillation import SelfDistillation as SelfDistillation
from .simclr import SimCLR as SimCLR
from .vpu import VPU as VPU

__all__ = [
    "BYOL",
    "DINO",
    "IBOT",
    "MAE",
    "VPU",
    "MoCoV3",
    "SSLMethod",
    "SelfDistillation",
    "SimCLR",
]
