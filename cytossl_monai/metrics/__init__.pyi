from .bootstrap import bootstrap_intervals as bootstrap_intervals
from .calibration import (
    brier_score as brier_score,
    expected_calibration_error as expected_calibration_error,
    fit_temperature as fit_temperature,
)
from .classification import classification_metrics as classification_metrics
from .knn import knn_cross_validate as knn_cross_validate, knn_predict as knn_predict
from .logged import loss_metric as loss_metric, read_log as read_log, scalars as scalars
from .nuclei import mask_dice as mask_dice, object_f1 as object_f1
from .probe import linear_probe as linear_probe

__all__ = [
    "bootstrap_intervals",
    "brier_score",
    "classification_metrics",
    "expected_calibration_error",
    "fit_temperature",
    "knn_cross_validate",
    "knn_predict",
    "linear_probe",
    "loss_metric",
    "mask_dice",
    "object_f1",
    "read_log",
    "scalars",
]
