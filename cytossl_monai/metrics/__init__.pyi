from .bootstrap import bootstrap_intervals as bootstrap_intervals
from .calibration import (
    brier_score as brier_score,
    expected_calibration_error as expected_calibration_error,
    fit_calibration as fit_calibration,
    fit_temperature as fit_temperature,
    training_prior as training_prior,
)
from .classification import classification_metrics as classification_metrics
from .knn import knn_predict as knn_predict
from .logged import loss_metric as loss_metric, read_log as read_log, scalars as scalars
from .nuclei import mask_dice as mask_dice, object_f1 as object_f1
from .probe import (
    group_folds as group_folds,
    knn_probe as knn_probe,
    linear_probe as linear_probe,
    paired_difference as paired_difference,
)

__all__ = [
    "bootstrap_intervals",
    "brier_score",
    "classification_metrics",
    "expected_calibration_error",
    "fit_calibration",
    "fit_temperature",
    "group_folds",
    "knn_predict",
    "knn_probe",
    "linear_probe",
    "loss_metric",
    "mask_dice",
    "object_f1",
    "paired_difference",
    "read_log",
    "scalars",
    "training_prior",
]
