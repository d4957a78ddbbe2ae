from .best_classifier import BestClassifier as BestClassifier
from .checkpoint import CheckpointHandler as CheckpointHandler
from .cohort_pages import CohortPages as CohortPages
from .collapse import CollapseMonitor as CollapseMonitor
from .csv_log import CSVLog as CSVLog
from .curves import CurvesPlot as CurvesPlot
from .export import EncoderExport as EncoderExport
from .online_evaluation import OnlineKNN as OnlineKNN, OnlineLinearProbe as OnlineLinearProbe
from .prediction_report import PredictionReport as PredictionReport
from .progress import ProgressBar as ProgressBar
from .signals import PreemptionHandler as PreemptionHandler
from .throughput import Throughput as Throughput

__all__ = [
    "BestClassifier",
    "CSVLog",
    "CheckpointHandler",
    "CohortPages",
    "CollapseMonitor",
    "CurvesPlot",
    "EncoderExport",
    "OnlineKNN",
    "OnlineLinearProbe",
    "PredictionReport",
    "PreemptionHandler",
    "ProgressBar",
    "Throughput",
]
