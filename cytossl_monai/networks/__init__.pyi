from .cards import (
    EncoderCard as EncoderCard,
    card_encoder as card_encoder,
    card_network as card_network,
    read_card as read_card,
    wrap_network as wrap_network,
)
from .convert import to_sr_transformer as to_sr_transformer
from .files import (
    build_encoder as build_encoder,
    bundle_network as bundle_network,
    load_classifier as load_classifier,
    load_encoder as load_encoder,
    require_trained as require_trained,
    save_classifier as save_classifier,
    save_encoder as save_encoder,
)
from .lora import add_lora as add_lora, merge_lora as merge_lora
from .mil.abmil import ABMIL as ABMIL
from .mil.clam import CLAM as CLAM
from .mil.classifier import MILClassifier as MILClassifier
from .mil.cytology.discriminant import CellDiscriminant as CellDiscriminant
from .mil.cytology.less import LESS as LESS
from .mil.cytology.reference import ReferenceBank as ReferenceBank
from .mil.cytology.svdd import DeepSVDD as DeepSVDD
from .mil.dsmil import DSMIL as DSMIL
from .mil.dtfd import DTFDMIL as DTFDMIL
from .mil.ensemble import MILEnsemble as MILEnsemble
from .mil.monai_heads import MONAIHead as MONAIHead, MONAIPyramidHead as MONAIPyramidHead
from .mil.pooling import MaxMIL as MaxMIL, MeanMIL as MeanMIL
from .mil.targets import MILLoss as MILLoss, n_outputs as n_outputs
from .mil.transmil import TransMIL as TransMIL
from .nets.efficientnet_lite import EfficientNetLite as EfficientNetLite, efficientnet_lite0 as efficientnet_lite0
from .nets.encoder import Encoder as Encoder
from .nets.program import CallableNetwork as CallableNetwork, ProgramNetwork as ProgramNetwork
from .nets.resnet import (
    ResNetFeatures as ResNetFeatures,
    ResNetV2Features as ResNetV2Features,
    SmallResNet as SmallResNet,
    resnet10 as resnet10,
    resnet18 as resnet18,
    resnet50 as resnet50,
    resnet50_v2 as resnet50_v2,
)
from .nets.sr_presets import (
    sr_vit_base as sr_vit_base,
    sr_vit_base_stem as sr_vit_base_stem,
    sr_vit_small as sr_vit_small,
    sr_vit_small_stem as sr_vit_small_stem,
    sr_vit_tiny as sr_vit_tiny,
    sr_vit_tiny_stem as sr_vit_tiny_stem,
    vit_small as vit_small,
)
from .nets.sr_transformer import SRTransformer as SRTransformer
from .open import continued_encoder as continued_encoder, open_encoder as open_encoder
from .weights import load_vit_weights as load_vit_weights

__all__ = [
    "ABMIL",
    "CLAM",
    "DSMIL",
    "DTFDMIL",
    "LESS",
    "CallableNetwork",
    "CellDiscriminant",
    "DeepSVDD",
    "EfficientNetLite",
    "Encoder",
    "EncoderCard",
    "MILClassifier",
    "MILEnsemble",
    "MILLoss",
    "MONAIHead",
    "MONAIPyramidHead",
    "MaxMIL",
    "MeanMIL",
    "ProgramNetwork",
    "ReferenceBank",
    "ResNetFeatures",
    "ResNetV2Features",
    "SRTransformer",
    "SmallResNet",
    "TransMIL",
    "add_lora",
    "build_encoder",
    "bundle_network",
    "card_encoder",
    "card_network",
    "continued_encoder",
    "efficientnet_lite0",
    "load_classifier",
    "load_encoder",
    "load_vit_weights",
    "merge_lora",
    "n_outputs",
    "open_encoder",
    "read_card",
    "require_trained",
    "resnet10",
    "resnet18",
    "resnet50",
    "resnet50_v2",
    "save_classifier",
    "save_encoder",
    "sr_vit_base",
    "sr_vit_base_stem",
    "sr_vit_small",
    "sr_vit_small_stem",
    "sr_vit_tiny",
    "sr_vit_tiny_stem",
    "to_sr_transformer",
    "vit_small",
    "wrap_network",
]
