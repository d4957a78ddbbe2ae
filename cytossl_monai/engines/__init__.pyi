from .bundle import bundle_root as bundle_root, run_training as run_training
from .mil.cross_validate import cross_validate as cross_validate
from .mil.evaluation import check_unseen as check_unseen
from .mil.few_shot import few_shot_curve as few_shot_curve
from .mil.marks import with_marks as with_marks
from .mil.predict import inference_items as inference_items, predict_items as predict_items
from .mil.trainer import (
    BagInferer as BagInferer,
    BagMetric as BagMetric,
    MILTrainer as MILTrainer,
    bag_loader as bag_loader,
    class_weights as class_weights,
    parameter_groups as parameter_groups,
    prepare_bags as prepare_bags,
    standardise as standardise,
)
from .settings.check import check_settings as check_settings
from .ssl.optim import LARS as LARS, build_optimizer as build_optimizer
from .ssl.precision import fast_precision as fast_precision
from .ssl.schedules import WarmupCosine as WarmupCosine
from .ssl.trainer import SSLTrainer as SSLTrainer
from .ssl.wrap import prepare as prepare, wrap as wrap
from .study.ablation import AblationStudy as AblationStudy

__all__ = [
    "LARS",
    "AblationStudy",
    "BagInferer",
    "BagMetric",
    "MILTrainer",
    "SSLTrainer",
    "WarmupCosine",
    "bag_loader",
    "build_optimizer",
    "bundle_root",
    "check_settings",
    "check_unseen",
    "class_weights",
    "cross_validate",
    "fast_precision",
    "few_shot_curve",
    "inference_items",
    "parameter_groups",
    "predict_items",
    "prepare",
    "prepare_bags",
    "run_training",
    "standardise",
    "with_marks",
    "wrap",
]
